"""What a benchmark is: one ``Bench`` value per op, made of cases, providers and a cost model.

The cost model is the same for all providers: the bytes that any implementation must move between
DRAM and the chip, each input once and each output once, and the operations of the leanest known
formulation. An operation is one fp32 instruction of one lane, so a fused multiply-add counts once
and half of a device's fp32 FLOP/s is its roof. Products of matrices are counted apart, in FLOP, for
tensor cores are a roof of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Arrays = tuple[npt.ArrayLike, ...]
Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Largest relative error, in norm over an output, with which a provider is still timed. Peers that
# compute in the dtype of their input need the room; wrong formulas are off by far more.
# An option of this name lets the products of fp32 be rounded.
TOLERANCE = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 1e-4, "tf32": 4e-3}


class AbsentError(Exception):
    """A provider that cannot take part, and why."""


@dataclass(frozen=True)
class Case:
    """One problem size.

    ``small`` is the same problem in small, for the numpy reference, the interpreter and the
    compiler: it launches the same kernels as often, specialised alike (divisibility by 16).
    """

    name: str
    sizes: Mapping[str, int]
    small: Mapping[str, int]
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")
    option: str = ""  # of the op: focal's reduction, the layout of NMS's boxes

    def shrunk(self) -> Case:
        return replace(self, sizes=self.small)


# Binds a provider to inputs, untimed; what it returns runs the forward pass.
Provider = Callable[[Case, Inputs], Callable[[], Tensor]]


Sizes = Mapping[str, int]
Constants = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """What one kernel works through, for its instructions per element and its predicted time."""

    elements: Callable[[Sizes], float]  # in all launches of a call
    # That a program handles in a pass of its innermost loop or, without ``loop``, in all.
    block: Callable[[Constants], int]
    loop: bool = False
    # How often a pass goes through the innermost loop, where that is in another one; the rest of
    # the program counts once a pass.
    trips: Callable[[Sizes, Constants], float] | None = None
    products: Callable[[Sizes], float] = lambda sizes: 0  # FLOP by tensor cores, in all launches
    # Bytes that do not grow with the elements, as those of weights; by bytes per element.
    fixed: Callable[[Sizes, int], float] = lambda sizes, itemsize: 0


@dataclass(frozen=True)
class Bench:
    """All there is to know about one op's benchmark."""

    name: str
    cases: tuple[Case, ...]  # of real networks
    small: tuple[Case, ...]  # so small that launches decide
    sweep: tuple[Case, ...]
    make: Callable[[Case, torch.dtype, torch.device], Inputs]
    providers: Mapping[str, Provider]  # the library's own is called "ours"
    reference: Callable[[Case, Inputs, str], Arrays]  # numpy; by mode
    bytes: Callable[[Case, str, int], int]  # by mode and bytes per element
    operations: Callable[[Case, str], int]  # by mode
    products: Callable[[Case, str], int] = lambda case, mode: 0  # of matrices, in FLOP, by mode
    # Launch settings by name, each with the values that the tuner tries in all combinations.
    settings: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    kernels: Mapping[str, Work] = field(default_factory=dict)
    # Launched by torch's own operations in a call, about.
    torch_kernels: Callable[[Sizes], int] = lambda sizes: 0
    leaves: tuple[str, ...] = ()  # inputs that get a gradient; "grad" is that of the output
    # Which, where a case's option is to tell them apart.
    leaves_by_option: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flags: Callable[[Case], AbstractContextManager[None]] = lambda case: contextlib.nullcontext()
    # Providers that do other work, and so are timed without a check, each with what it leaves out.
    unlike: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False  # outputs must be equal, not close
    # The right answer by construction, where the formula or the reference takes too long or too
    # much memory at full size.
    known: Callable[[Case, Inputs], Tensor] | None = None
    capturable: bool = True  # in a CUDA graph: the host never waits
    # What must hold while a small case runs, for it to launch as often as the case it stands for.
    shrunk: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


Job = tuple[Bench, Case, str, str]  # dtype, mode

# Which cases ``--cases`` takes.
SETS = {"small": ("small",), "real": ("cases",), "full": ("cases", "small", "sweep")}


def jobs(benches: Iterable[Bench], dtypes: Collection[str], cases: str = "real") -> list[Job]:
    """What there is to do, the cases of real networks of all ops first."""
    return [
        (bench, case, dtype, mode)
        for kind in SETS[cases]
        for bench in benches
        for case in getattr(bench, kind)
        for dtype in case.dtypes
        if dtype in dtypes
        for mode in case.modes
    ]


def load(op: str) -> Bench:
    """The benchmark of one op of ``perf.OPS``."""
    bench: Bench = importlib.import_module(f".{op}", __package__).BENCH
    return bench


def bind(
    bench: Bench, provider: str, case: Case, mode: str, inputs: Inputs
) -> Callable[[], Outputs]:
    """One provider's whole work for ``mode``, as a function without arguments.

    Raises:
        AbsentError: the provider cannot do this case.
    """
    names = bench.leaves_by_option.get(case.option, bench.leaves)
    leaves = [inputs[name].requires_grad_(mode != "fwd") for name in names]
    forward = bench.providers[provider](case, inputs)
    grad, partial = inputs.get("grad"), provider in bench.unlike

    def call() -> Outputs:
        with bench.flags(case):
            out = forward()
            if mode == "fwd":
                return (out,)
            found = torch.autograd.grad(out, leaves, grad, allow_unused=partial)
            return (out.detach(), *(t for t in found if t is not None))

    return call


def precision(case: Case, dtype: str) -> str:
    """In what a case's products are computed: the key of its tolerance, and part of its roof's."""
    return case.option if case.option in TOLERANCE else dtype


def amounts(bench: Bench, case: Case, dtype: str, mode: str) -> dict[str, Any]:
    """The part of a row that the floor is made of."""
    found = {
        "bytes": bench.bytes(case, mode, DTYPES[dtype].itemsize),
        "operations": bench.operations(case, mode),
    }
    if products := bench.products(case, mode):
        return found | {"products": products, "precision": precision(case, dtype)}
    return found


def error(got: Outputs, want: Outputs, exact: bool = False) -> float:
    """The largest relative error in norm of the outputs; infinite where they are not comparable."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if exact:
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
        elif b.numel():
            b = b.double()
            distance = (a.double() - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)
            worst = max(worst, float(distance.nan_to_num(float("inf"), float("inf"))))
    return worst


def expected(bench: Bench, case: Case, inputs: Inputs, mode: str) -> Outputs:
    """The outputs according to the numpy reference."""
    device = next(iter(inputs.values())).device
    on_cpu = {name: t.detach().cpu() for name, t in inputs.items()}
    outputs = bench.reference(case, on_cpu, mode)
    return tuple(torch.from_numpy(np.array(a)).to(device) for a in outputs)


def optional(module: str) -> Any:
    """A module, or the reason why a provider that needs it is absent."""
    try:
        return importlib.import_module(module)
    except Exception as e:  # a build for another torch fails in many ways
        raise AbsentError(f"{module} does not import: {type(e).__name__}: {e}") from e


@functools.cache
def compiled(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compile``, for one shape at a time and without graph breaks."""
    return torch.compile(formula, fullgraph=True, dynamic=False)
