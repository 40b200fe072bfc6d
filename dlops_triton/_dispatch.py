"""The only file that knows devices, dispatch keys, the interpreter and streams.

A public function checks its arguments and calls an op of the ``dlops`` namespace. CUDA and ROCm
tensors reach the op's Triton launcher. CPU tensors reach the numpy reference, or, under
``TRITON_INTERPRET=1``, the same launcher, whose kernels the interpreter then runs in numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from . import _vmap

INTERPRETED = bool(triton.knobs.runtime.interpret)

# "kernel" or "reference". Private: a test fixture turns it, so that both are covered in one run.
cpu_implementation = "kernel" if INTERPRETED else "reference"

_library = torch.library.Library("dlops", "DEF")


def register(
    schema: str,
    launcher: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
    vmap: _vmap.Rule | None = None,
) -> Callable[..., Any]:
    """Define ``dlops::<schema>`` and return its overload.

    ``launcher`` runs the kernels, ``reference`` takes and returns CPU tensors, ``fake`` gives the
    metadata of the result. ``vmap`` is what :func:`torch.vmap` does; by default it calls the op for
    one after another, and stacks the results.

    define/impl is the registration that costs least per call and the only one that opcheck,
    fullgraph compilation and the interpreter all accept.
    """
    name = schema.split("(", 1)[0]

    def on_cpu(*args: Any) -> Any:
        return (launcher if cpu_implementation == "kernel" else reference)(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _library.impl(name, launcher, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"dlops::{name}", fake, lib=_library)
    op = getattr(torch.ops.dlops, name).default
    if vmap is None:
        why = f"torch.vmap does not take dlops::{name}, which updates a tensor in place"
        vmap = _vmap.refused(why) if "!" in schema else _vmap.loop
    rule = functools.partial(vmap, op)
    torch.library.register_vmap(f"dlops::{name}", rule, lib=_library)
    return op


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """Launch ``kernel`` on its first argument's device and that device's current stream.

    Every launch of the library passes here: the tests count launches, and the compile gate compiles
    what the launchers really ask for, by replacing this function.
    """
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **settings)
    else:
        kernel[grid](*args, **settings)


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for ``device``. "meta" has none, of which torch may not be asked."""
    # To ask torch which devices have it breaks the graph of torch.compile in torch 2.10.
    return device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. ``triton.cdiv`` takes 100 times as long on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is no less than n, which is at least 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def gpu(device: torch.device) -> tuple[str, str]:
    """A GPU's name and the compiler's target for it, "sm_90" or "gfx942"; empty for the CPU."""
    if device.type != "cuda":
        return "", ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.name, properties.gcnArchName.split(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


# By device and stream. A stream runs one kernel after another, so its kernels can share.
_counters: dict[tuple[torch.device, int, int, torch.dtype], Tensor] = {}


def counter(device: torch.device, size: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    """[size], 0, in which the programs of a launch count themselves; the last sets it to 0."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream, beside anything.
        return torch.zeros(size, dtype=dtype, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, size, dtype)
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = torch.zeros(size, dtype=dtype, device=device)
    return found


def inline_ptx(device: torch.device) -> bool:
    """Whether kernels may hold PTX, which only NVIDIA's compiler takes."""
    return gpu(device)[1].startswith("sm_")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precision(dtype: torch.dtype, device: torch.device) -> Literal["tf32", "ieee"]:
    """How ``tl.dot`` multiplies: in fp32 as torch's flag for matrix products says."""
    target = gpu(device)[1]
    if dtype != torch.float32 or (target.startswith("gfx") and target != "gfx942"):
        return "ieee"
    flags = torch.backends.cuda.matmul
    # The older flag refuses to be read once the newer, of torch 2.9, is in use.
    newer = getattr(flags, "fp32_precision", None)
    allowed = flags.allow_tf32 if newer is None else newer == "tf32"
    return "tf32" if allowed else "ieee"


def to_numpy(t: Tensor) -> npt.NDArray[Any]:
    """A CPU tensor's values; bfloat16, which numpy lacks, as float32.

    Of a copy: the memory of what ``numpy()`` was called of cannot be freed while the tensor lives,
    as ``fully_shard`` frees that of parameters.
    """
    return (t.float() if t.dtype == torch.bfloat16 else t.clone()).detach().numpy()


def from_numpy(a: npt.ArrayLike, dtype: torch.dtype) -> Tensor:
    """A CPU tensor of ``dtype`` with the values of ``a``, in memory of its own."""
    return torch.tensor(np.asarray(a)).to(dtype)


def implementation(device: torch.device | str | None = None) -> str:
    """Say in words what runs the ops on ``device``.

    Args:
        device: a device or its name; by default the current CUDA device, or the CPU without one.

    Returns:
        For example ``"Triton 3.6.0 on NVIDIA H200"``, ``"Triton 3.9.0 interpreter on CPU"`` or
        ``"numpy reference on CPU"``.

    Raises:
        ValueError: the library has no implementation for this kind of device.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        return f"Triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        raise ValueError(f"device must be a CUDA, ROCm or CPU device, got {str(device)!r}")
    if cpu_implementation == "kernel":
        return f"Triton {triton.__version__} interpreter on CPU"
    return "numpy reference on CPU"
