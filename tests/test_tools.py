"""The tools find the faults they are for: each test plants one, beside a sound twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from triton.runtime.errors import InterpreterError

from dlops_triton import _dispatch
from tests.tools import planted
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import install_fixes, reversed_programs, shuffled
from tests.tools.traffic import traffic

INTERPRETED = triton.knobs.runtime.interpret
interpreter_only = pytest.mark.skipif(
    not INTERPRETED, reason="kernels run compiled here; this is a tool for the interpreter"
)
pytestmark = pytest.mark.unmetered  # by the meter of conftest.py
if INTERPRETED:
    install_fixes()
    install_fixes()  # changes nothing

BF16 = torch.bfloat16


def every_bf16(seed: int | None = None) -> torch.Tensor:
    """All 65,536 values, NaNs, infinities and subnormals included, in order or shuffled."""
    bits = torch.arange(1 << 16)
    if seed is not None:
        bits = bits[torch.randperm(len(bits), generator=torch.Generator().manual_seed(seed))]
    return bits.to(torch.uint16).view(BF16)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def leaving_out_nan(op, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As GPUs take minimum and maximum; torch.fmin and fmax keep a signalling NaN."""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, op(x, y)))


# bfloat16 and casts


@interpreter_only
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("+", torch.add),
        ("-", torch.sub),
        ("*", torch.mul),
        ("/", torch.div),
        ("min", lambda x, y: leaving_out_nan(torch.minimum, x, y)),
        ("max", lambda x, y: leaving_out_nan(torch.maximum, x, y)),
        ("<", torch.lt),
        ("!=", torch.ne),
        ("literal", lambda x, y: x * torch.tensor(1.7, dtype=BF16) + torch.tensor(0.3, dtype=BF16)),
        ("where", lambda x, y: torch.where(x > y, x, y * 0)),
        ("-x", lambda x, y: -x),
        ("abs", lambda x, y: x.abs()),
        ("fma", lambda x, y: (x.double() * y.double() + x.double()).to(BF16)),
    ],
)
def test_bf16_arithmetic(op, expected):
    x, y = every_bf16(), every_bf16(seed=0)
    want = expected(x, y)
    got = torch.empty_like(want)
    planted.arithmetic_kernel[(2,)](x, y, got, OP=op, BLOCK=1 << 15)
    assert_same(got, want)


def fp32_samples() -> torch.Tensor:
    """Any bits, and every tie between two bfloat16 values with both its neighbours."""
    rng = np.random.default_rng(0)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) + np.uint32(0x8000)
    bits = np.concatenate([rng.integers(0, 1 << 32, 1 << 16, np.uint32), ties, ties - 1, ties + 1])
    return torch.from_numpy(bits.view(np.float32))


@interpreter_only
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (fp32_samples(), BF16),
        (fp32_samples().double() * (1 + 2**-40), BF16),
        (every_bf16(), torch.float32),
        (every_bf16(), torch.float64),
        (every_bf16(), torch.float16),
        (torch.arange(1 << 16).to(torch.uint16).view(torch.float16), BF16),
        (torch.arange(-(1 << 17), 1 << 17, 4) * 12_345, BF16),
        (every_bf16(), torch.bool),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_cast(source, target):
    got = torch.empty(source.shape, dtype=target)
    planted.cast_kernel[(1,)](source, got, BLOCK=len(source))
    assert_same(got, source.to(target))


@interpreter_only
def test_cast_to_integer_saturates():
    """As GPUs convert. numpy would give the lowest integer on x86, and another elsewhere."""
    x = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), float("nan"), 2.9, -2.9, 0.0])
    low, high = -(2**31), 2**31 - 1
    for source in (x, x.double(), x.bfloat16()):
        got = torch.empty(8, dtype=torch.int32)
        planted.cast_kernel[(1,)](source, got, BLOCK=8)
        assert got.tolist() == [high, low, high, low, 0, 2, -2, 0]


@interpreter_only
def test_bf16_reductions():
    x = torch.randint(-8, 9, (16, 64), generator=torch.Generator().manual_seed(0)).to(BF16)
    for op, want in {
        "sum": x.sum(1),
        "sum of all": x.sum().reshape(1),
        "sum, kept": x.sum(1),
        "max": x.amax(1),
        "argmin": x.argmin(1),
        "cumsum": x.float().cumsum(1).to(BF16),
    }.items():
        got = torch.empty_like(want)
        planted.reduce_kernel[(1,)](x, got, OP=op, ROWS=16, COLS=64)
        assert_same(got, want)
    small = x[:2, :8].contiguous()
    got = torch.empty_like(small)
    planted.reduce_kernel[(1,)](small, got, OP="sort", ROWS=2, COLS=8)
    assert_same(got, small.sort(1).values)


@interpreter_only
def test_bf16_sum_rounds_each_addition():
    x = torch.zeros(1, 256, dtype=BF16)
    x[0, 0] = 256  # its neighbours are 2 apart
    x[0, [2**i for i in range(8)]] = 0.9  # each meets 256 in another step of the tree
    got = torch.empty(1, dtype=BF16)
    planted.reduce_kernel[(1,)](x, got, OP="sum", ROWS=1, COLS=256)
    assert got.item() == 256
    assert x.double().sum() > 263


@interpreter_only
def test_fma_rounds_once():
    z = torch.tensor([1 + 2**-23])
    x, y = torch.tensor([2**-12 * (1 + 2**-23)]), torch.tensor([2**-12 * (1 - 2**-23)])
    want = z  # just under half a unit more; two roundings find a tie and go up

    @triton.jit
    def fma_kernel(x_ptr, y_ptr, z_ptr):
        tl = triton.language
        tl.store(z_ptr, tl.fma(tl.load(x_ptr), tl.load(y_ptr), tl.load(z_ptr)))

    assert (x.double() * y.double() + z.double()).float().item() != want.item()
    got = z.clone()
    fma_kernel[(1,)](x, y, got)
    assert got.item() == want.item()


@interpreter_only
def test_loop_bounds_and_float_arguments():
    y = torch.empty(1, dtype=torch.float64)
    planted.loop_kernel[(1,)](torch.tensor([3, 10]), y, 0.1)
    assert y.item() == 7 * float(np.float32(0.1))


# Order of programs


@interpreter_only
@pytest.mark.parametrize("grid", [(7,), (2, 3), (2, 2, 2), (2,)], ids=str)
@pytest.mark.parametrize("order", [reversed_programs, lambda: shuffled(0)], ids=["back", "random"])
def test_other_order(grid, order):
    n = int(np.prod(grid))
    x = torch.arange(n, 0, -1.0)
    usual, other = torch.zeros(n), torch.zeros(n)
    planted.running_max_kernel[grid](x, usual)
    assert_same(usual, x.cummax(0).values)
    counts = torch.zeros(n, dtype=torch.int32)
    with order():
        planted.running_max_kernel[grid](x, other)
        planted.count_kernel[(n,)](torch.arange(n), counts, BLOCK=1)
    assert not torch.equal(usual, other), "a kernel that relies on the order of programs"
    assert counts.tolist() == [1] * n, "each program runs once"
    planted.running_max_kernel[grid](x, other)
    assert_same(usual, other)


# Traffic and bounds


def double(x, y, n, *, extra=0, even=False, block=1024):
    grid = (triton.cdiv(n, block),)
    planted.double_kernel[grid](x, y, n, EXTRA=extra, EVEN=even, BLOCK=block)


@interpreter_only
def test_traffic_is_exact():
    x, y = torch.ones(1000), torch.empty(1000)
    counts = torch.zeros(4, dtype=torch.int32)
    with traffic(sectors=True) as outer:
        with traffic() as inner:
            double(x, y, 1000, block=256)
        planted.count_kernel[(2,)](torch.zeros(32, dtype=torch.int64), counts, BLOCK=16)
    assert y.eq(2).all()
    assert counts.tolist() == [32, 0, 0, 0]
    assert (inner.loaded, inner.stored, inner.atomic) == (4000, 4000, 0)
    assert (inner.loads, inner.stores, inner.launches, inner.programs) == (4, 4, 1, 4)
    assert (inner.loaded_sectors, inner.stored_sectors) == (0, 0)
    assert (outer.loaded, outer.stored, outer.atomic) == (4000 + 256, 4000, 128)
    assert outer.total == 4000 + 256 + 4000 + 2 * 128
    assert (outer.loaded_sectors, outer.stored_sectors) == (125 + 8 + 1, 125 + 1)
    assert outer.kernels == ["double_kernel", "count_kernel"]
    assert outer.out_of_bounds == 0


@interpreter_only
def test_sectors_are_distinct_per_launch():
    index = torch.arange(64) * 4 % 32
    with traffic(sectors=True) as t:
        for _ in range(2):
            planted.gather_kernel[(1,)](torch.ones(64), index, torch.empty(64), 64, BLOCK=64)
    assert t.loaded == 2 * 64 * (4 + 8)
    assert t.loaded_sectors == 2 * (4 + 16), "x has 4 sectors of use, the indices fill 16"
    assert t.stored_sectors == 2 * 8
    assert t.dram == 32 * (t.loaded_sectors + t.stored_sectors)


@interpreter_only
def test_lane_beyond_the_end():
    memory = torch.ones(2048)
    x, y = memory[:1000], memory[1024:]
    with traffic() as t, pytest.raises(IndexError) as e:
        double(x, y, 1000, extra=1)
    assert t.out_of_bounds == 1
    assert str(e.value) == (
        "double_kernel: load with 1 of 1001 active lanes out of bounds; nearest is x_ptr, "
        "which spans 1000 elements: element 1000 lies 4 bytes past its end"
    )
    with traffic() as t, pytest.raises(IndexError, match=r"store with 48 .* y_ptr.* 192 b"):
        double(memory[:1024], memory[1024:2000], 1024 - 24, extra=24)
    assert t.out_of_bounds == 48


@interpreter_only
def test_lane_in_a_neighbouring_tensor():
    memory = torch.ones(2048)
    with traffic(), pytest.raises(IndexError, match=r"load with 1024 of 1024 .* x_ptr"):
        planted.double_kernel[(2,)](memory[:1024], memory, 2048, EXTRA=0, EVEN=True, BLOCK=1024)
    columns = memory.view(64, 32)[:, 3:5]  # a view's gaps are its own
    with traffic():
        planted.double_kernel[(1,)](columns, memory, 63 * 32 + 2, EXTRA=0, EVEN=False, BLOCK=2048)


@interpreter_only
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (64, "1 of 64 .* x_ptr, .* element 64 lies 4 bytes past"),
        (-1, "1 of 64 .* x_ptr, .* element -1 lies 4 bytes before"),
        (1 << 40, "1 of 64 .* x_ptr, .* past"),
        (-(1 << 61) + 1, "1 of 64"),
        (63, None),
    ],
)
def test_gather(index, message):
    x, y = torch.ones(64), torch.empty(64)
    indices = torch.zeros(64, dtype=torch.int64)
    indices[7] = index
    with traffic() as t:
        if message is None:
            planted.gather_kernel[(1,)](x, indices, y, 64, BLOCK=64)
        else:
            with pytest.raises(IndexError, match=message):
                planted.gather_kernel[(1,)](x, indices, y, 64, BLOCK=64)
            assert t.out_of_bounds == 1


@interpreter_only
def test_overflowing_offset():
    x, y = torch.ones(4), torch.zeros(1)
    for wide, message in (
        (True, "element 2147483648 lies 8589934580 bytes past its end"),
        (False, "element -2147483648 lies 8589934592 bytes before its start"),
    ):
        with traffic(), pytest.raises(IndexError, match=message):
            planted.far_row_kernel[(1,)](x, y, 2, 1 << 30, WIDE=wide)


@interpreter_only
def test_address_in_memory():
    x, y = torch.tensor([3.0, 4.0]), torch.empty(1)
    table = torch.tensor([x.data_ptr() + 4])
    with traffic([x]):
        planted.follow_kernel[(1,)](table, y)
    assert y.item() == 4
    with traffic([x[:1]]), pytest.raises(IndexError, match=r"reachable tensor.* element 1 lies 4"):
        planted.follow_kernel[(1,)](table, y)
    with traffic(), pytest.raises(IndexError, match=r"load with 1 of 1 .* nearest is "):
        planted.follow_kernel[(1,)](table, y)


@interpreter_only
def test_meter_leaves_nothing_behind():
    with traffic(), pytest.raises(InterpreterError, match="power of 2"):
        planted.arithmetic_kernel[(1,)](
            torch.empty(4), torch.empty(4), torch.empty(4), OP=None, BLOCK=3
        )
    with traffic(), pytest.raises(IndexError):
        double(torch.ones(2), torch.ones(2), 3)
    x = torch.ones(4)
    y = torch.empty(4)
    double(x, y, 4)
    assert y.eq(2).all()


# Host


def kernel_in_disguise(x: torch.Tensor, way: str) -> torch.Tensor:
    y = torch.empty_like(x)
    _dispatch.launch(
        planted.double_kernel, (1,), x, y, x.numel(), EXTRA=0, EVEN=False, BLOCK=256,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if way == "item":
        y.sum().item()
    elif way == "branch":
        assert y.sum() > 0
    elif way == "mask":
        y[y > 1]
    elif way == "assign":
        y[y > 1] = torch.ones(x.numel(), device=x.device)
    elif way == "list":
        y.tolist()
    elif way == "upload":
        torch.tensor([1.0], device=x.device)
    elif way == "unique":
        y.unique()
    elif way == "fill":
        y[y > 1] = 0.0  # a masked fill: no wait
    return y


@pytest.fixture(scope="module")
def planted_op():
    library = torch.library.Library("planted", "DEF")
    library.define("f(Tensor x, str way) -> Tensor")
    for key in ("CPU", "CUDA"):
        library.impl("f", kernel_in_disguise, key)
    yield torch.ops.planted.f.default
    library._destroy()


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="nothing here runs a kernel"
)
@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("item", "aten::_local_scalar_dense in aten::item in planted::f"),
        ("branch", "aten::_local_scalar_dense in aten::item in aten::is_nonzero in planted::f"),
        ("mask", "aten::nonzero in aten::index in planted::f"),
        ("assign", "aten::nonzero in aten::_index_put_impl_ in aten::index_put_ in planted::f"),
        ("list", "tolist"),
        ("upload", "tensor"),
        ("unique", "aten::_unique2 in planted::f"),
        ("fill", None),
        ("none", None),
    ],
)
def test_host_cost(planted_op, way, found):
    x = torch.ones(200, device="cpu" if INTERPRETED else "cuda")
    with host_cost() as cost:
        planted_op(x, way)
    assert cost.launches == ["double_kernel"]
    assert cost.synchronisations == ([found] if found else [])
    assert cost.torch_ops["aten::empty_like"] == 1
    if way == "none":
        assert sum(cost.torch_ops.values()) == 1, "the interpreter's own operations are left out"
