"""Make Triton's interpreter compute what a GPU would, on Triton 3.6 to 3.9.

The stock interpreter stores bfloat16 as its bits and adds, compares and sums those bits as
integers, truncates where a GPU rounds to nearest even, keeps a float argument in double precision
where a GPU has fp32, takes no inline PTX, and runs a grid's programs in one fixed order. A test
under it would pass kernels that are wrong on a GPU, and fail kernels that are right.
`install_fixes` corrects the arithmetic, and also runs kernels made of many small functions several
times faster; `shuffled` and `reversed_programs` change the order of programs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as core
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle as Handle

from . import shortcuts

Array = npt.NDArray[Any]

_WIDE_INTEGERS = (tl.int32, tl.uint32, tl.int64, tl.uint64)


def float_to_bf16(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """The bits of `values` in bfloat16, rounded to nearest even; any NaN becomes 0x7fc0."""
    floats = np.asarray(values, np.float32)
    bits = floats.reshape(-1).view(np.uint32).reshape(floats.shape)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(floats), 0x7FC0, rounded).astype(np.uint16)


def bf16_to_float(bits: Array) -> npt.NDArray[np.float32]:
    """The values, exact, of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bf16(handle: Handle) -> bool:
    return handle.data.dtype.char == "H" and bool(handle.dtype.scalar == tl.bfloat16)


def _values(handle: Handle) -> Array:
    return bf16_to_float(handle.data) if _is_bf16(handle) else handle.data


def _result(values: Array) -> Handle:
    """A handle for what an operation on bfloat16 gave: a truth value or a bfloat16 again."""
    if values.dtype == np.bool_:
        return Handle(values, tl.int1)
    return Handle(float_to_bf16(values), tl.bfloat16)


def _saturated(values: Array, dtype: np.dtype[Any]) -> Array:
    """Convert floats to integers as GPUs do: out of range saturates, NaN is 0."""
    info = np.iinfo(dtype)
    wide = values.astype(np.float64)
    below, above = wide < info.min, wide >= float(info.max)
    out = np.where(below | above | np.isnan(wide), 0, values).astype(dtype)
    out[below], out[above] = info.min, info.max
    return out


def _rcp_ftz(bits: Array) -> Array:
    values = 1 / bits.view(np.float32)
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values).view(np.uint32)


# What the kernels' inline PTX is made of, on the bits of a register.
_PTX: dict[str, Callable[..., Array]] = {
    "shl.b32": np.left_shift,
    "and.b32": np.bitwise_and,
    "rcp.approx.ftz.f32": _rcp_ftz,
}


class _Results(NamedTuple):
    values: list[Handle]

    def get_result(self, i: int) -> Handle:
        return self.values[i]


class _Builder(core.InterpreterBuilder):  # type: ignore[misc]
    """The interpreter's arithmetic, with bfloat16 computed in fp32 and rounded once."""

    def get_bf16(self, value: float) -> Handle:
        return _result(np.array([value], np.float32))

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable[..., Array]) -> Handle:
        if _is_bf16(lhs):
            return _result(op(_values(lhs), _values(rhs)))
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: Handle, op: Callable[..., Array]) -> Handle:
        return _result(op(_values(arg))) if _is_bf16(arg) else super().unary_op(arg, op)

    def ternary_op(self, a: Handle, b: Handle, c: Handle, op: Callable[..., Array]) -> Handle:
        if _is_bf16(c) and op is not np.where:  # a select moves bits, whatever they mean
            return _result(op(_values(a), _values(b), _values(c)))
        return super().ternary_op(a, b, c, op)

    # Where Triton's default leaves a NaN out, a GPU returns the other operand; 3.6 returns NaN.
    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, x: Handle, low: Handle, high: Handle, propagate: Any) -> Handle:
        if propagate == ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(x, low), high)
        return self.ternary_op(x, low, high, np.clip)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        if z.dtype.scalar == tl.float64:
            return super().create_fma(x, y, z)
        return _fma(x, y, z)

    def create_rsqrt(self, arg: Handle) -> Handle:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_dot(self, a: Handle, b: Handle, d: Handle, *settings: Any) -> Handle:
        if _is_bf16(a) or _is_bf16(b):
            product = np.matmul(_values(a), _values(b), dtype=np.float32)
            return Handle(product + d.data, d.dtype.scalar)
        return super().create_dot(a, b, d, *settings)

    def create_inline_asm(
        self, asm: str, constraints: str, values: list[Handle], types: list[Any], *settings: Any
    ) -> _Results:
        """Run straight-line PTX on 32-bit registers, which hold one fp32 or two half values."""
        _, pack = settings
        registers = [
            halves
            for handle in values
            for halves in np.ascontiguousarray(handle.data).reshape(-1, pack).view(np.uint32).T
        ]
        outputs = len(types) * pack
        registers = [np.zeros_like(registers[0])] * outputs + registers
        for statement in filter(None, map(str.strip, asm.split(";"))):
            opcode, operands = statement.split(None, 1)
            to, *inputs = (operand.strip() for operand in operands.split(","))
            arguments = [
                registers[int(i[1:])] if i[0] == "$" else np.uint32(int(i, 0)) for i in inputs
            ]
            registers[int(to[1:])] = _PTX[opcode](*arguments)
        shape = values[0].data.shape
        results = [
            np.stack(registers[i * pack : (i + 1) * pack], axis=-1).view(np.float32).reshape(shape)
            for i in range(len(types))
        ]
        return _Results([Handle(values, tl.float32) for values in results])

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        dst = dst_type.scalar
        if dst == tl.bfloat16:
            # Through fp32 even from fp64 and int64: so do GPUs, and torch.
            return src if _is_bf16(src) else _result(src.data.astype(np.float32))
        values = _values(src)
        if values.dtype.kind == "f" and dst in _WIDE_INTEGERS:
            return Handle(_saturated(values, core._get_np_dtype(dst)), dst)
        if _is_bf16(src) and not dst.is_fp8():
            return Handle(values.astype(core._get_np_dtype(dst)), dst)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding: Any) -> Handle:
        halves = {src.dtype.scalar, dst_type.scalar} == {tl.bfloat16, tl.float16}
        if halves or (dst_type.scalar == tl.bfloat16 and rounding == ir.ROUNDING_MODE.RTNE):
            return self.cast_impl(self.cast_impl(src, tl.float32), dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding)


def _fma(x: Handle, y: Handle, z: Handle) -> Handle:
    """x y + z rounded once, for formats whose products are exact in double precision.

    The double-precision sum is rounded to odd before it is rounded to the format, without which
    two roundings could give another result than one. 3.6 rounds the product too.
    """
    product = _values(x).astype(np.float64) * _values(y).astype(np.float64)
    addend = _values(z).astype(np.float64)
    total = product + addend
    virtual = total - product
    lost = (product - (total - virtual)) + (addend - virtual)
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (lost != 0) & even
    odd = np.where(inexact, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
    return _result(odd) if _is_bf16(z) else Handle(odd.astype(z.data.dtype), z.dtype.scalar)


def _tensor(handle: Handle, block: bool) -> tl.tensor:
    shape = list(handle.data.shape)
    return tl.tensor(handle, tl.block_type(handle.dtype, shape) if block else handle.dtype)


class _ReduceOps(core.ReduceOps):  # type: ignore[misc]
    def sum(self, input: tl.tensor) -> tl.tensor:
        """Sum bfloat16 pairwise, rounding each addition: a GPU keeps no wider accumulator here.

        A GPU's order depends on the layout, so its last bits differ from these.
        """
        if input.dtype != tl.bfloat16:
            return super().sum(input)
        values = bf16_to_float(input.handle.data)
        axis = 0 if self.axis is None else self.axis
        if self.axis is None:
            values = values.reshape(-1)
        values = np.moveaxis(values, axis, 0)
        while len(values) > 1:
            half = len(values) // 2
            values = bf16_to_float(float_to_bf16(values[:half] + values[half:]))
        if self.keep_dims:
            shape = [1] * input.handle.data.ndim
            total = values.reshape(shape) if self.axis is None else np.moveaxis(values, 0, axis)
            return _tensor(_result(total), block=True)
        return _tensor(_result(np.atleast_1d(values[0])), block=values[0].ndim > 0)

    def generic_reduce(self, input: Any) -> Any:
        """Combine bits at once: element by element, the stock way takes 0.1 ms each."""
        if self.combine_fn is not tl.standard._or_combine:
            return super().generic_reduce(input)
        (values,) = input if isinstance(input, tuple) else (input,)
        bits = np.bitwise_or.reduce(
            values.handle.data, axis=self.axis, keepdims=self.keep_dims or self.axis is None
        )
        bits = np.atleast_1d(bits)
        result = _tensor(Handle(bits, values.dtype.scalar), block=bits.size > 1 or self.keep_dims)
        return (result,) if isinstance(input, tuple) else result

    def min_max(self, input: Any, *operations: Any, **named: Any) -> Any:
        values = input[0] if isinstance(input, tuple) else input
        if values.dtype != tl.bfloat16:
            with warnings.catch_warnings():  # that all is NaN
                warnings.simplefilter("ignore", RuntimeWarning)
                return super().min_max(input, *operations, **named)
        wide = Handle(bf16_to_float(values.handle.data), tl.float32)
        found = super().min_max(_tensor(wide, block=True), *operations, **named)
        value, *index = found if isinstance(found, tuple) else (found,)
        value = _tensor(_result(value.handle.data), value.type.is_block())
        return (value, *index) if index else value


class _ScanOps(core.ScanOps):  # type: ignore[misc]
    def cumsum(self, input: tl.tensor) -> list[tl.tensor]:
        return self._accumulate(input, np.add) or super().cumsum(input)

    def cumprod(self, input: tl.tensor) -> list[tl.tensor]:
        return self._accumulate(input, np.multiply) or super().cumprod(input)

    def _accumulate(self, input: tl.tensor, op: np.ufunc) -> list[tl.tensor]:
        if input.dtype != tl.bfloat16:
            return []
        values = np.moveaxis(bf16_to_float(input.handle.data), self.axis, 0).copy()
        for i in range(1, len(values)):
            values[i] = bf16_to_float(float_to_bf16(op(values[i - 1], values[i])))
        return [_tensor(_result(np.moveaxis(values, 0, self.axis)), block=True)]


def _sort(x: tl.tensor, dim: Any = None, descending: Any = False) -> tl.tensor:
    """Sort integers at once: a network of comparisons takes the interpreter seconds."""
    if not x.dtype.is_int():
        return _stock_sort(x, dim, descending)
    axis = -1 if dim is None else int(getattr(dim, "value", dim))
    values = np.sort(x.handle.data, axis=axis)
    backwards = bool(getattr(descending, "value", descending))
    return _tensor(
        Handle(np.flip(values, axis).copy() if backwards else values, x.dtype.scalar), block=True
    )


def _to_tensor(arg: Any) -> Any:
    """A scalar argument as a GPU gets it: a float in fp32, whatever it meets later."""
    if isinstance(arg, bool):
        return tl.tensor(Handle(np.array([arg]), tl.int1), tl.int1)
    if isinstance(arg, float):
        return tl.tensor(Handle(np.array([arg], np.float32), tl.float32), tl.float32)
    return _stock_to_tensor(arg)


_stock_sort = tl.sort
_stock_to_tensor = core._implicit_cvt
_stock_patch_tensor = core._patch_lang_tensor
_stock_launch = core.GridExecutor.__call__
_patched: set[int] = set()


def _patch_tensor(tensor: type, scope: Any) -> None:
    """Let any tensor of one element bound a loop; 3.6 with numpy 2 takes only 0-d ones."""
    _stock_patch_tensor(tensor, scope)

    def index(self: tl.tensor) -> int:
        return int(self.handle.data.item())

    scope.set_attr(tensor, "__index__", index)


def _launch(self: core.GridExecutor, *args: Any, **kwargs: Any) -> None:
    _patched.clear()
    with np.errstate(all="ignore"):  # a GPU computes inf and NaN without a word
        _stock_launch(self, *args, **kwargs)


@functools.cache
def _languages(fn: Callable[..., Any]) -> frozenset[int]:
    return frozenset(id(m) for m in fn.__globals__.values() if m is tl or m is tl.core)


def _call_function(self: core.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Call a device function. The stock call patches all of triton.language again: 0.3 ms each."""
    needed = _languages(self.fn)
    if not needed <= _patched:
        core._patch_lang(self.fn)
        _patched.update(needed)
    try:
        return self.rewrite()(*args, **kwargs)
    except InterpreterError:
        raise
    except Exception as e:
        raise InterpreterError(repr(e)) from e


def install_fixes() -> None:
    """Correct the interpreter of this process; more calls change nothing."""
    core.interpreter_builder.__class__ = core.InterpreterBuilder = _Builder
    core.ReduceOps, core.ScanOps = _ReduceOps, _ScanOps
    core._implicit_cvt, core._patch_lang_tensor = _to_tensor, _patch_tensor
    core.GridExecutor.__call__ = _launch
    tl.sort = _sort
    core.InterpretedFunction.__call__ = _call_function
    shortcuts.install()


@contextlib.contextmanager
def _program_order(arrange: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Run the programs of each launch in the order that `arrange(their number)` gives.

    The interpreter's own loop is left alone: what a program is told it is, is what changes.
    """
    builder = core.interpreter_builder
    set_grid, set_program = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def set_grid_dim(*dims: int) -> None:
        set_grid(*dims)
        order[:] = arrange(math.prod(dims))

    def set_grid_idx(x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        program = order[(x * ny + y) * nz + z]
        set_program(program // (ny * nz), program // nz % ny, program % nz)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_grid, set_program


def reversed_programs() -> contextlib.AbstractContextManager[None]:
    """Run each grid's programs last to first."""
    return _program_order(lambda n: range(n - 1, -1, -1))


def shuffled(seed: int) -> contextlib.AbstractContextManager[None]:
    """Run each grid's programs in an order drawn at random, never the usual one."""
    rng = random.Random(seed)

    def arrange(n: int) -> Sequence[int]:
        order = rng.sample(range(n), n)
        return order if n < 2 or order != sorted(order) else order[::-1]

    return _program_order(arrange)
