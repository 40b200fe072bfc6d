"""Deformable convolution and its sampling against the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton import (
    _deform,
    _deform_ops,
    _dispatch,
    _settings,
    deform_conv2d,
    deform_sample,
)
from dlops_triton.reference import deform as reference
from dlops_triton.reference.deform import Geometry
from tests.arrays import numpy
from tests.deform_cases import Case, check_columns, check_convolution, draw, large_tiles
from tests.tolerances import assert_close
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import shuffled

IMPLEMENTATIONS = ["fused", "columns"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASES, CHUNKS = 320, 8


def convolve(case: Case, implementation: Any = None) -> Tensor:
    options = case.convolution | {"_implementation": implementation}
    return deform_conv2d(case.x, case.offset, case.weight, **options)


def check(case: Case, implementation: str, rng: np.random.Generator, sampled: bool) -> None:
    out = convolve(case, implementation)
    last = torch.channels_last
    assert out.is_contiguous() or not case.x.is_contiguous()
    assert (
        out.is_contiguous(memory_format=last)
        or not case.x.is_contiguous(memory_format=last)
        or case.x.is_contiguous()
    )
    g = torch.from_numpy(rng.normal(size=tuple(out.shape))).to(out.dtype).to(out.device)
    check_convolution(case, out, g, list(torch.autograd.grad(out, case.given, g)))
    if sampled:
        columns = deform_sample(case.x, case.offset, **case.sampling)
        g = torch.from_numpy(rng.normal(size=tuple(columns.shape))).to(out.dtype).to(out.device)
        given = [t for t in (case.x, case.offset, case.mask) if t is not None]
        check_columns(case, columns, g, list(torch.autograd.grad(columns, given, g)))


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "others"])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_configurations(chunk: int, exact: bool, kernel: torch.device) -> None:
    """320 in fp64 and 320 in the other dtypes, by either implementation and either summation."""
    with large_tiles():
        for seed in range(chunk, CASES, CHUNKS):
            rng = np.random.default_rng(seed)
            dtype = torch.float64 if exact else DTYPES[int(rng.integers(3))]
            case = draw(rng, dtype).to(kernel)
            torch.use_deterministic_algorithms(seed // CHUNKS % 2 == 0, warn_only=True)
            implementation = IMPLEMENTATIONS[seed // CHUNKS // 2 % 2]
            try:
                check(case, implementation, rng, sampled=seed // CHUNKS % 4 == 0)
            except AssertionError as e:
                raise AssertionError(f"seed {seed}, {dtype}, {implementation}: {e}") from e


# ---- what it must equal


def plain(rng: np.random.Generator, dtype: torch.dtype, device: torch.device) -> Case:
    """Two offset groups and two groups of weights, everything there is."""
    geometry = Geometry((3, 2), (2, 1), (1, 1), (1, 2))
    sizes = ((2, 8, 7, 6), (2, 24, 4, 6), (2, 12, 4, 6), (6, 4, 3, 2), (6,))
    tensors = [torch.from_numpy(rng.normal(size=size)).to(dtype) for size in sizes]
    return Case(*tensors, geometry).to(device)


def with_(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


def gradients(case: Case, implementation: str | None) -> list[Tensor]:
    out = convolve(case, implementation)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    grad = weights.reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, case.given, grad)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation: str, device: torch.device, rng: np.random.Generator) -> None:
    case = plain(rng, torch.float64, device)
    names = ("stride", "padding", "dilation")
    pairs = {name: getattr(case.geometry, name) for name in names}

    def run(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(
            x, offset, weight, bias, **pairs, mask=mask, _implementation=implementation
        )

    x, offset, mask, weight, bias = case.given
    with large_tiles():
        assert torch.autograd.gradcheck(run, (x, offset, weight, bias, mask), fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda x, offset, mask: deform_sample(x, offset, **case.geometry._asdict(), mask=mask),
            (x, offset, mask),
            fast_mode=True,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_offsets_make_a_convolution(
    dtype: torch.dtype, implementation: str, device: torch.device, rng: np.random.Generator
) -> None:
    case = plain(rng, dtype, device)
    case = with_(case, offset=torch.zeros_like(case.offset), mask=None)
    got = convolve(case, implementation)
    pairs = case.geometry[1:]
    want = F.conv2d(case.x, case.weight, case.bias, *pairs, groups=2)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    g = torch.from_numpy(rng.normal(size=tuple(want.shape))).to(dtype).to(device)
    wanted = (case.x, case.weight, case.bias)
    for a, b in zip(
        torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=rtol, atol=10 * rtol)
    columns = deform_sample(case.x, case.offset, **case.sampling)
    stride, padding, dilation = pairs
    unfolded = F.unfold(case.x, case.geometry.kernel_size, dilation, padding, stride)
    assert torch.equal(columns, unfolded)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_mask_is_a_mask_of_ones(
    dtype: torch.dtype, implementation: str, device: torch.device, rng: np.random.Generator
) -> None:
    case = plain(rng, dtype, device)
    ones = with_(case, mask=torch.ones_like(case.mask).requires_grad_())
    with large_tiles():
        got, want = (
            gradients(with_(case, mask=None), implementation),
            gradients(ones, implementation),
        )
        del want[3]  # that by the mask
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        sampled = [
            deform_sample(c.x, c.offset, **c.sampling) for c in (with_(case, mask=None), ones)
        ]
        assert torch.equal(*sampled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset_dtype", [torch.float16, torch.float32], ids=str)
def test_coordinates_on_a_large_map(
    dtype: torch.dtype, offset_dtype: torch.dtype, device: torch.device, rng: np.random.Generator
) -> None:
    """Near 2,048 half-precision coordinates are a pixel or more apart; offsets are not."""
    size, step = 2048, 89
    x = torch.zeros(1, 1, size, size, dtype=dtype)
    x[:] = torch.from_numpy(rng.normal(size=(size, size))).to(dtype)
    count = (size - 1) // step + 1
    offset = torch.from_numpy(rng.uniform(-1, 1, (1, 2, count, count))).to(offset_dtype)
    weight = torch.ones(1, 1, 1, 1, dtype=dtype)
    got = deform_conv2d(x.to(device), offset.to(device), weight.to(device), stride=step)
    geometry = Geometry((1, 1), (step, step))
    want = reference.conv2d(numpy(x), numpy(offset), None, numpy(weight), None, geometry)
    scale = reference.conv2d(abs(numpy(x)), numpy(offset), None, numpy(weight), None, geometry)
    assert_close(got, want, scale, terms=dtype)
    # To far less than what moving a coordinate by a quarter of a pixel would do.
    moved = reference.conv2d(numpy(x), numpy(offset) + 0.25, None, numpy(weight), None, geometry)
    error = np.abs(numpy(got) - want).max()
    assert error < 0.05 * np.abs(moved - want).mean()


# ---- how


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deterministic_gradients(
    implementation: str, kernel: torch.device, rng: np.random.Generator
) -> None:
    """To the last bit, over runs and, where it can be chosen, over the order of programs."""
    case = plain(rng, torch.float32, kernel)
    offset = case.offset.detach() * 0.1  # many samples between the same pixels
    case = with_(case, offset=offset.requires_grad_())
    tiles = {"sample_bwd": 16, "conv_bwd": 16, "conv_wgrad": 16, "gather": 16}
    with contextlib.ExitStack() as stack:
        for name, size in tiles.items():
            stack.enter_context(_settings.override(f"deform_{name}", BM=size))
        stack.enter_context(_settings.override("deform_conv_wgrad", SPLIT=16))
        want = gradients(case, implementation)
        for seed in (1, 2):
            with shuffled(seed) if kernel.type == "cpu" else contextlib.nullcontext():
                got = gradients(case, implementation)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        torch.use_deterministic_algorithms(False)
        fast = gradients(case, implementation)
    for i, (a, b) in enumerate(zip(fast, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if i != 1:  # that by the image is added as programs come
            assert torch.equal(a, b) or implementation == "fused"


def allocated(call: Any) -> list[int]:
    """Sizes in bytes of what a call allocates, in the order of allocation."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def test_memory_of_the_fused_forward(kernel: torch.device) -> None:
    """The plan, the weights in another order and the result, and nothing of the columns' size."""
    if kernel.type != "cpu":
        pytest.skip("allocations are counted on the CPU")
    b, c, h, w, taps, groups = 2, 64, 8, 16, 9, 2
    x = torch.randn(b, c, h, w, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    offset = torch.randn(b, 2 * groups * taps, h, w)
    weight = torch.randn(32, c, 3, 3, dtype=torch.bfloat16)
    mask = torch.rand(b, groups * taps, h, w)
    with torch.no_grad(), mock.patch.object(_dispatch, "launch"):
        sizes = allocated(lambda: deform_conv2d(x, offset, weight, padding=1, mask=mask))
    out, samples = 2 * b * 32 * h * w, b * h * w * taps * groups
    assert sum(sizes) <= 40 * samples + out + 2 * weight.numel() + 1024
    assert max(sizes) < 2 * c * taps * b * h * w


def test_only_the_needed_gradients(kernel: torch.device, rng: np.random.Generator) -> None:
    """Each alone costs no kernel that is another's, and is what it is with the others."""
    case = plain(rng, torch.float32, kernel)
    launches = {"x": 2, "offset": 3, "mask": 3, "weight": 2, "bias": 0}
    with large_tiles():
        torch.use_deterministic_algorithms(False)
        together = dict(zip(launches, gradients(case, "fused")[1:], strict=True))
        for name, count in launches.items():
            alone = with_(case)
            for other in launches:
                t = getattr(case, other).detach().requires_grad_(other == name)
                alone = with_(alone, **{other: t})
            out = convolve(alone, "fused")
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=kernel)
            with host_cost() as cost:
                out.backward(weights.reshape(out.shape).to(out.dtype))
            assert len(cost.launches) == count, name
            assert cost.synchronisations == []
            got = getattr(alone, name).grad
            torch.testing.assert_close(got, together[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice(dtype: torch.dtype, kernel: torch.device) -> None:
    """One kernel where tensor cores multiply and chunks are full; TF32 as torch's flag says."""

    def kernels(channels: int, groups: int = 1) -> set[str]:
        x = torch.zeros(1, channels, 4, 4, dtype=dtype, device=kernel)
        offset = torch.zeros(1, 2, 4, 4, device=kernel)
        weight = torch.zeros(16 * groups, channels // groups, 1, 1, dtype=dtype, device=kernel)
        with host_cost() as cost:
            deform_conv2d(x, offset, weight)
        return set(cost.launches) - {"deform_plan_kernel"}

    fused, columns = {"deform_conv_fwd_kernel"}, {"deform_sample_fwd_kernel"}
    half = dtype in (torch.float16, torch.bfloat16)
    assert kernels(16) == (fused if half else columns)
    assert kernels(16, 2) == kernels(8) == columns
    with mock.patch.object(_dispatch, "precision", return_value="tf32"):
        assert kernels(16) == fused


def test_tf32_is_torchs_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert _dispatch.precision(torch.float32, device) == "ieee"
    flags = torch.backends.cuda.matmul
    flags.allow_tf32 = True
    try:
        assert _dispatch.precision(torch.float32, device) == "tf32"
        for dtype in (torch.float64, torch.half):
            assert _dispatch.precision(dtype, device) == "ieee"
        for target, want in (("sm_90", "tf32"), ("gfx942", "tf32"), ("gfx950", "ieee")):
            monkeypatch.setattr(_dispatch, "gpu", lambda device, t=target: ("", t))
            assert _dispatch.precision(torch.float32, device) == want
    finally:
        flags.allow_tf32 = False


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shipped_tiles_and_long_addresses(
    implementation: str, kernel: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles of outputs, of channels both ways, of splits and of images; 64-bit indices."""
    rng = np.random.default_rng(0)
    case = draw_of(rng, (2, 72, 9, 9), 3, (270 * 3, 24, 1, 1), torch.bfloat16).to(kernel)
    monkeypatch.setattr(_deform, "_is_wide", lambda x, plan: True)
    monkeypatch.setattr(_deform_ops, "columns_limit", 72 * 81 * 2)
    with _settings.override("deform_conv_wgrad", SPLIT=128):
        check(case, implementation, rng, sampled=implementation == "fused")


def draw_of(
    rng: np.random.Generator,
    size: tuple[int, ...],
    offset_groups: int,
    weight: tuple[int, ...],
    dtype: torch.dtype,
) -> Case:
    """A convolution of one tap."""
    b, _, h, w = size
    sizes = (size, (b, 2 * offset_groups, h, w), (b, offset_groups, h, w), weight, weight[:1])
    tensors = [torch.from_numpy(rng.normal(size=s)).to(dtype) for s in sizes]
    return Case(*tensors, Geometry((1, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inline_ptx_changes_nothing(
    dtype: torch.dtype,
    kernel: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    case = plain(rng, dtype, kernel)
    results = []
    for ptx in (False, True):
        monkeypatch.setattr(_dispatch, "inline_ptx", lambda device, ptx=ptx: ptx)
        with large_tiles():
            results.append(gradients(case, "fused"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_by_columns_keeps_to_the_limit(
    kernel: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward: columns of as many images at a time, and no two of them."""
    if kernel.type != "cpu":
        pytest.skip("allocations are counted on the CPU")
    b, c, size, taps = 6, 32, 16, 9
    x = torch.randn(b, c, size, size).contiguous(memory_format=torch.channels_last)
    offset = torch.randn(b, 2 * taps, size, size)
    weight = torch.randn(8, c, 3, 3, requires_grad=True)
    limit = 2 * 4 * c * taps * size * size
    monkeypatch.setattr(_deform_ops, "columns_limit", limit)
    x.requires_grad_()
    monkeypatch.setattr(_dispatch, "launch", lambda *_, **__: None)
    with torch.profiler.profile(profile_memory=True) as p:
        deform_conv2d(x, offset, weight, padding=1).sum().backward()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    big = [n for n in sizes if abs(n) >= limit]
    assert len([n for n in big if n > 0]) == 9  # three parts, forward and two gradients
    assert max(itertools.accumulate(big)) == limit
