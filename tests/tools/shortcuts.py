"""Spare the interpreter what it does again and again to the same effect.

Of the time that an interpreted kernel takes, numpy's arithmetic is a small part; most goes into the
types of values, each made, validated and compared anew. What a kernel computes, what it is refused,
and which memory it reaches stay as they are: what is remembered here is what Triton's own code made
of the same question, and what is left out is a check whose outcome is only read in its debug mode.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as core

stock_block_type = tl.block_type.__init__
stock_tensor = tl.tensor.__init__
stock_equal = {kind: kind.__eq__ for kind in (tl.dtype, tl.block_type)}
stock_np_dtype = core._get_np_dtype
stock_broadcast = core.interpreter_semantic.broadcast_impl_value

_block_types: dict[Any, tl.block_type] = {}  # by element and shape
_np_dtypes: dict[str, np.dtype[Any]] = {}  # by the name of a type of the language


def _key(element_ty: tl.dtype, shape: Any) -> Any:
    """A name tells where to a pointer is and whether it is const, but not its address space."""
    sizes = [s.value if isinstance(s, tl.constexpr) else s for s in shape]
    return element_ty.name, getattr(element_ty, "address_space", None), *sizes


def _new_block_type(cls: type, element_ty: tl.dtype, shape: Any) -> tl.block_type:
    return _block_types.get(_key(element_ty, shape)) or object.__new__(cls)


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    if not vars(self):
        stock_block_type(self, element_ty, shape)
        _block_types[_key(element_ty, shape)] = self


def _init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """All attributes but the handle are those of every tensor of the type."""
    known = vars(type).get("_of_tensors")
    if known is None:
        stock_tensor(self, handle, type)
        type._of_tensors = {k: v for k, v in vars(self).items() if k != "handle"}
    else:
        vars(self).update(known)
        self.handle = handle


def _equal(self: tl.dtype, other: Any) -> bool:
    if type(self) is type(other) is tl.dtype:
        return self.name == other.name
    return self is other or stock_equal[tl.dtype](self, other)


def _equal_block_types(self: tl.block_type, other: Any) -> bool:
    return self is other or stock_equal[tl.block_type](self, other)


def _np_dtype(tt_dtype: tl.dtype) -> np.dtype[Any]:
    found = _np_dtypes.get(tt_dtype.name)
    if found is None:
        found = _np_dtypes[tt_dtype.name] = stock_np_dtype(tt_dtype)
    return found


def _broadcast(lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    a, b = lhs.type, rhs.type
    if a.is_block() and b.is_block() and a.shape.values == b.shape.values:
        return lhs, rhs
    return stock_broadcast(lhs, rhs)


def install() -> None:
    """Speed up the interpreter of this process; more calls change nothing."""
    builder = core.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    tl.block_type.__new__ = _new_block_type
    tl.block_type.__init__ = _init_block_type
    tl.block_type.__eq__ = _equal_block_types
    tl.tensor.__init__ = _init_tensor
    tl.dtype.__eq__ = _equal
    core._get_np_dtype = _np_dtype
    core.interpreter_semantic.broadcast_impl_value = _broadcast
