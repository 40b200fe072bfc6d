"""Benchmark of deformable convolutions, 3 x 3 and with a mask, on the maps of an 800 x 1216 image.

Options: "input", "offset" (with the mask) and "weight" give a gradient to these alone, for what
each adds to the forward pass; "deterministic" and "tf32" set torch's flags; "sample" makes columns.
Input and gradient are channels-last. Offsets are normal, with a deviation of sigma pixels, and
keep 1/8 pixel from integers: there interpolation has a kink, and a provider's rounding would pick
the side. Offsets of 0, as a network has at first, get no gradient here for that reason.

Bytes: forward reads input, offset, mask and weight, and writes the output; backward reads its
gradient and, of the others, what the gradients that are asked for depend on, and writes these.
Operations: 8 for each tap, channel and output, 4 conversions and 4 multiply-adds, forward, and as
many again for each gradient, where that by input adds to memory and that by weight samples anew.
Products of matrices: 2 FLOP for each of these and each channel of the output, forward, for the
gradient by weight, and for those by input, offset and mask together.

"fused" and "columns" are ours with the implementation that ours has not chosen. "eager" takes each
tap by grid_sample, in fp32, for a position on a map this large is no number of fp16; "compile" is
that compiled. torchvision computes half precision in fp32, as its autocast has it, and copies the
input to its own format. "conv2d" ignores offset and mask: what a user pays for a plain one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton import _deform, _deform_ops, deform_conv2d, deform_sample
from dlops_triton.reference import deform as reference

from .bench import AbsentError, Arrays, Bench, Case, Inputs, Sizes, Work, compiled, optional

_LEAVES = {
    "input": ("input",),
    "offset": ("offset", "mask"),
    "weight": ("weight",),
    "sample": ("input", "offset", "mask"),
}
_ALL = ("input", "offset", "mask", "weight")


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    s = case.sizes
    n, c, h, w, co, groups = (s[name] for name in ("n", "c", "h", "w", "co", "groups"))
    taps = s["kh"] * s["kw"]
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        t = torch.randn(*shape, generator=g, dtype=dtype, device=device)
        return t.contiguous(memory_format=torch.channels_last)

    offset = s["sigma"] * torch.randn(n, 2 * groups * taps, h, w, generator=g, device=device)
    if s["sigma"]:
        floor = offset.floor()
        offset = floor + (offset - floor).clamp(1 / 8, 7 / 8)
    sampled = case.option == "sample"
    grad = (n, c * taps, h * w) if sampled else (n, co, h, w)
    return {
        "input": normal(n, c, h, w),
        "offset": offset.to(dtype),
        "mask": torch.rand(n, groups * taps, h, w, generator=g, device=device).to(dtype),
        "weight": normal(co, c, s["kh"], s["kw"]).contiguous() / (c * taps) ** 0.5,
        "grad": torch.randn(*grad, generator=g, dtype=dtype, device=device)
        if sampled
        else normal(*grad),
    }


def columns(i: Inputs) -> Tensor:
    """What each tap sees, [B, C * taps, H * W], in fp32 or fp64."""
    x, offset, mask = (
        i[name].to(torch.promote_types(i[name].dtype, torch.float32))
        for name in ("input", "offset", "mask")
    )
    n, c, h, w = x.shape
    kh, kw = i["weight"].shape[2:]
    taps = kh * kw
    groups = mask.shape[1] // taps
    image = x.reshape(n * groups, c // groups, h, w)
    d = offset.reshape(n * groups, taps, 2, h, w)
    m = mask.reshape(n * groups, taps, 1, h, w)
    rows = torch.arange(h, device=x.device) - kh // 2
    across = torch.arange(w, device=x.device) - kw // 2
    found = []
    for k in range(taps):
        at_y = d[:, k, 0] + (rows + k // kw)[:, None]
        at_x = d[:, k, 1] + (across + k % kw)
        grid = torch.stack([at_x * (2 / (w - 1)) - 1, at_y * (2 / (h - 1)) - 1], -1)
        found.append(F.grid_sample(image, grid, align_corners=True) * m[:, k])
    return torch.stack(found, 2).reshape(n, c * taps, h * w)


def formula(i: Inputs, sampled: bool) -> Tensor:
    """A padding of zeros has the op's borders, for ``align_corners`` puts -1 on the first pixel."""
    seen = columns(i).to(i["input"].dtype)
    if sampled:
        return seen
    out = torch.einsum("ok,nkl->nol", i["weight"].flatten(1), seen)
    return out.reshape(len(out), -1, *i["mask"].shape[2:])


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    if case.option == "sample":
        kernel, padding = (case.sizes["kh"], case.sizes["kw"]), _padding(case)
        return lambda: deform_sample(i["input"], i["offset"], kernel, 1, padding, 1, i["mask"])
    return _conv(case, i, None)


def _padding(case: Case) -> tuple[int, int]:
    return case.sizes["kh"] // 2, case.sizes["kw"] // 2


def _conv(
    case: Case, i: Inputs, implementation: _deform_ops.Implementation | None
) -> Callable[[], Tensor]:
    return lambda: deform_conv2d(
        i["input"],
        i["offset"],
        i["weight"],
        padding=_padding(case),
        mask=i["mask"],
        _implementation=implementation,
    )


def _other(
    implementation: _deform_ops.Implementation,
) -> Callable[[Case, Inputs], Callable[[], Tensor]]:
    def bind(case: Case, i: Inputs) -> Callable[[], Tensor]:
        _no_sampling(case)
        with _flags(case):
            x = i["input"].permute(0, 2, 3, 1)
            chosen = _deform_ops._choose(x, i["offset"], i["weight"])
        if chosen == implementation:
            raise AbsentError("it is what ours has chosen")
        return _conv(case, i, implementation)

    return bind


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: formula(i, case.option == "sample")


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: compiled(formula)(i, case.option == "sample")


def _torchvision(case: Case, i: Inputs) -> Callable[[], Tensor]:
    _no_sampling(case)
    conv = optional("torchvision.ops").deform_conv2d

    def call() -> Tensor:
        x, offset, weight, mask = (
            i[name].to(torch.promote_types(i[name].dtype, torch.float32))
            for name in ("input", "offset", "weight", "mask")
        )
        out: Tensor = conv(x, offset, weight, padding=_padding(case), mask=mask)
        return out.to(i["input"].dtype)

    return call


def _conv2d(case: Case, i: Inputs) -> Callable[[], Tensor]:
    _no_sampling(case)
    if case.option == "offset":
        raise AbsentError("it has no offset")
    return lambda: F.conv2d(i["input"], i["weight"], padding=_padding(case))


def _no_sampling(case: Case) -> None:
    if case.option == "sample":
        raise AbsentError("it is a whole convolution")


@contextlib.contextmanager
def _flags(case: Case) -> Iterator[None]:
    """What a case's option asks of torch; peers without a deterministic gradient only warn."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    fixed = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul.allow_tf32 = cudnn.allow_tf32 = case.option == "tf32"
    torch.use_deterministic_algorithms(case.option == "deterministic", warn_only=True)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
        torch.use_deterministic_algorithms(fixed, warn_only=warns)


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    x, offset, mask, weight, grad = (i[name].float().numpy() for name in (*_ALL, "grad"))
    kernel = case.sizes["kh"], case.sizes["kw"]
    geometry = reference.Geometry(kernel, padding=_padding(case))
    grads: Arrays = ()
    if case.option == "sample":
        out = reference.sample(x, offset, mask, geometry)
        if mode != "fwd":
            grads = reference.sample_grad(x, offset, mask, geometry, grad)
    else:
        out = reference.conv2d(x, offset, mask, weight, None, geometry)
        if mode != "fwd":
            grads = reference.conv2d_grad(x, offset, mask, weight, geometry, grad)
    named = dict(zip(_ALL, grads, strict=False))
    return (out, *(named[name] for name in _leaves(case) if named))


def _leaves(case: Case) -> tuple[str, ...]:
    return _LEAVES.get(case.option, _ALL)


def _pixels(s: Sizes) -> int:
    return s["n"] * s["h"] * s["w"]


def _samples(s: Sizes) -> int:
    return _pixels(s) * s["groups"] * s["kh"] * s["kw"]


def _seen(s: Sizes) -> int:
    """Elements of the columns."""
    return _pixels(s) * s["c"] * s["kh"] * s["kw"]


def _weight(s: Sizes) -> int:
    return s["kh"] * s["kw"] * s["c"] * s["co"]


def _flop(s: Sizes) -> int:
    return 2 * _seen(s) * s["co"]


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    s, leaves = case.sizes, _leaves(case)
    sampled = case.option == "sample"
    sizes = {
        "input": _pixels(s) * s["c"],
        "offset": 2 * _samples(s),
        "mask": _samples(s),
        "weight": 0 if sampled else _weight(s),
    }
    out = _seen(s) if sampled else _pixels(s) * s["co"]
    elements = sum(sizes.values()) + out
    if mode != "fwd":
        elements += out + sizes["offset"] + sizes["mask"] + sum(sizes[name] for name in leaves)
        elements += sizes["input"] if leaves != ("input",) else 0
        elements += sizes["weight"] if leaves != ("weight",) else 0
    return itemsize * elements


def _passes(case: Case, mode: str, *gradients: tuple[str, ...]) -> int:
    """The forward pass, and those of the gradients that a case asks for."""
    asked = [names for names in gradients if mode != "fwd" and set(names) & set(_leaves(case))]
    return 1 + len(asked)


def _operations(case: Case, mode: str) -> int:
    return 8 * _passes(case, mode, ("input",), ("offset", "mask"), ("weight",)) * _seen(case.sizes)


def _products(case: Case, mode: str) -> int:
    if case.option == "sample":
        return 0
    return _passes(case, mode, _ALL[:3], ("weight",)) * _flop(case.sizes)


def _tile(constants: Mapping[str, int]) -> int:
    return constants["BM"] * constants["BK"]


def _cube(constants: Mapping[str, int]) -> int:
    return constants["BM"] * constants["BN"] * constants["BK"]


def _sums(s: Sizes, itemsize: int) -> int:
    """The splits of the weights' gradient, in fp32."""
    split = _deform.CONV_WGRAD.defaults[torch.float32]["SPLIT"]
    return -(-_pixels(s) // split) * 4 * _weight(s)


_SAMPLES = Work(elements=_samples, block=lambda k: k["BLOCK"])
_PASSES = Work(elements=_seen, block=_tile, loop=True)
_PRODUCTS = Work(
    elements=lambda s: _flop(s) / 2,
    block=_cube,
    loop=True,
    products=_flop,
    fixed=lambda s, itemsize: itemsize * _weight(s),
)

_BLOCKS = {"BLOCK": (128, 256), "num_warps": (4, 8)}
_SAMPLED = {"BM": (16, 32, 64), "LINE": (128, 256), "num_warps": (4, 8)}


def _case(
    name: str,
    sizes: tuple[int, ...],
    option: str = "",
    groups: int = 1,
    sigma: int = 1,
    dtypes: tuple[str, ...] = ("bf16",),
    modes: tuple[str, ...] = ("fwd", "fwd+bwd"),
) -> Case:
    """A case of n images, c channels in and out, and h x w pixels."""
    n, c, h, w = sizes
    kernel = {"kh": 3, "kw": 3}
    full = {"n": n, "c": c, "h": h, "w": w, "co": c, **kernel, "groups": groups, "sigma": sigma}
    # 16 divides the one's sizes and strides where it divides the other's.
    low, across = (4, 16) if w % 16 == 0 else (8, 8) if h * w % 16 == 0 else (4, 14)
    # Farther than a pixel, most taps would see nothing of a map this small.
    small = {**full, "n": 2, "h": low, "w": across, "sigma": min(sigma, 1)}
    return Case(name, full, small, dtypes, modes, option)


_C3, _C4, _P2 = (8, 256, 100, 152), (16, 512, 50, 76), (2, 256, 200, 304)
_FLOATS, _BOTH = ("bf16", "fp16", "fp32"), ("bf16", "fp32")

BENCH = Bench(
    name="deform",
    cases=(
        _case("256x100x152", _C3, dtypes=_FLOATS),
        _case("256x200x304", _P2, dtypes=_BOTH),
        _case("tf32", _C3, "tf32", dtypes=("fp32",)),
        _case("sample", _C3, "sample", dtypes=_BOTH),
        _case("deterministic", _C3, "deterministic", dtypes=_BOTH, modes=("fwd+bwd",)),
        _case("512x50x76", _C4, dtypes=_BOTH),
        _case("4-offset-groups", _C3, groups=4),
        _case("far-offsets", _C3, sigma=8),
        _case("no-offsets", _C3, "input", sigma=0),
        *(_case(f"d-{name}", _C3, name, modes=("fwd+bwd",)) for name in _ALL if name in _LEAVES),
    ),
    small=(_case("64x20x20", (1, 64, 20, 20)),),
    sweep=tuple(_case(f"batch-{n}", (n, *_C3[1:])) for n in (1, 2, 4)),
    make=make,
    providers={
        "ours": _ours,
        "fused": _other("fused"),
        "columns": _other("columns"),
        "eager": _eager,
        "compile": _compile,
        "torchvision": _torchvision,
        "conv2d": _conv2d,
    },
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    products=_products,
    settings={
        "deform_plan": _BLOCKS,
        "deform_shift_bwd": _BLOCKS,
        "deform_sample_fwd": _SAMPLED,
        "deform_sample_bwd": _SAMPLED,
        "deform_gather": {"BM": (8, 16), "LINE": (128, 256), "num_warps": (2, 4)},
        "deform_conv_fwd": {
            "BM": (64, 128),
            "BN": (128, 256),
            "LINE": (128,),
            "num_warps": (4, 8),
            "num_stages": (2, 3),
        },
        "deform_conv_bwd": {
            "BM": (64, 128),
            "BN": (32, 64),
            "LINE": (128,),
            "num_warps": (4, 8),
            "num_stages": (2, 3),
        },
        "deform_conv_wgrad": {
            "BM": (32, 64),
            "BN": (128, 256),
            "LINE": (128,),
            "SPLIT": (4096, 8192),
            "num_warps": (4, 8),
            "num_stages": (2,),
        },
    },
    kernels={
        "deform_plan_kernel": _SAMPLES,
        "deform_shift_bwd_kernel": _SAMPLES,
        "deform_sample_fwd_kernel": _PASSES,
        "deform_sample_bwd_kernel": _PASSES,
        # Each sample lies around four pixels.
        "deform_gather_kernel": replace(_PASSES, elements=lambda s: 4 * _seen(s)),
        "deform_conv_fwd_kernel": _PRODUCTS,
        "deform_conv_bwd_kernel": Work(
            elements=_seen,
            block=_tile,
            trips=lambda s, k: -(-s["co"] // k["BN"]),
            products=_flop,
            fixed=_PRODUCTS.fixed,
        ),
        "deform_conv_wgrad_kernel": replace(_PRODUCTS, fixed=_sums),
    },
    torch_kernels=lambda sizes: 4,  # around the weights and sums over splits, and of zeros
    leaves=_ALL,
    leaves_by_option=_LEAVES,
    flags=_flags,
    unlike={"conv2d": "it has no offset and no mask"},
)
