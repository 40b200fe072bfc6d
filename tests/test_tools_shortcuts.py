"""What the interpreter is spared would have come out the same, and is refused where it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter as core
from triton.runtime.interpreter import TensorHandle

from tests.tools import shortcuts

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels run compiled here"
)

SHAPES: list[list[Any]] = [[1], [4], [4, 1], [1, 4], [4, 2], [2, 2, 2]]
SCALARS = [
    *(tl.int1, tl.int8, tl.uint8, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16),
    *(tl.float32, tl.float64, tl.dtype("fp32")),
    tl.pointer_type(tl.float32),
    tl.pointer_type(tl.float32),
    tl.pointer_type(tl.float32, const=True),
    tl.pointer_type(tl.float32, address_space="shared"),
    tl.pointer_type(tl.int32),
]


def stock(element: tl.dtype, shape: list[Any]) -> tl.block_type:
    made = object.__new__(tl.block_type)
    shortcuts.stock_block_type(made, element, shape)
    return made


def told(value: Any) -> dict[str, str]:
    """The attributes, of which the language does not compare all."""
    return {k: f"{type(v)} {v!r}" for k, v in vars(value).items() if not k.startswith("_")}


def test_types_of_blocks() -> None:
    for _ in range(2):
        for element in SCALARS:
            for shape in SHAPES:
                for sizes in (shape, tl.tuple(shape), [tl.constexpr(s) for s in shape]):
                    made = tl.block_type(element, sizes)
                    assert told(made) == told(stock(element, sizes))
                    space = getattr(element, "address_space", None)
                    assert getattr(made.element_ty, "address_space", None) == space


def test_types_of_blocks_are_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.int32, [4, 3])
        with pytest.raises(ValueError, match="exceeds triton maximum"):
            tl.block_type(tl.int32, [1 << 11, 1 << 11])
        with pytest.raises(TypeError, match="0d block_type"):
            tl.block_type(tl.int32, [])


def test_equality() -> None:
    blocks = [make(e, s) for e in SCALARS for s in SHAPES[1:4] for make in (tl.block_type, stock)]
    for kind in (tl.dtype, tl.block_type):
        others = [*SCALARS, *blocks, None, 4, "fp32", tl.constexpr(tl.float32)]
        for a in (x for x in (*SCALARS, *blocks) if type(x) is kind):
            for b in others:
                assert (a == b) == bool(shortcuts.stock_equal[kind](a, b)), (a, b)


def test_tensors() -> None:
    for _ in range(2):
        for element in SCALARS:
            for shape in ([], *SHAPES):
                of = tl.block_type(element, shape) if shape else element
                handle = TensorHandle(np.zeros(shape or 1, core._get_np_dtype(element)), element)
                got, want = tl.tensor(handle, of), object.__new__(tl.tensor)
                shortcuts.stock_tensor(want, handle, of)
                assert got.handle is want.handle
                assert got.type is of
                assert told(got) == told(want)


def test_dtypes_of_numpy() -> None:
    for _ in range(2):
        for element in SCALARS:
            for of in (element, tl.block_type(element, [4])):
                assert core._get_np_dtype(of) == shortcuts.stock_np_dtype(of)


def test_broadcasting() -> None:
    blocks = [
        tl.tensor(TensorHandle(np.arange(np.prod(s), dtype=np.int32).reshape(s), tl.int32), of)
        for s, of in ((s, tl.block_type(tl.int32, s)) for s in (*SHAPES, [8], [2, 4]))
    ]
    scalar = tl.tensor(TensorHandle(np.array([7], np.int32), tl.int32), tl.int32)

    def outcome(broadcast: Any, a: tl.tensor, b: tl.tensor) -> Any:
        try:
            return [(told(x.type), x.handle.data.tolist()) for x in broadcast(a, b)]
        except ValueError as e:
            return str(e)

    refused = 0
    for a in (*blocks, scalar):
        for b in (*blocks, scalar):
            want = outcome(shortcuts.stock_broadcast, a, b)
            assert outcome(core.interpreter_semantic.broadcast_impl_value, a, b) == want
            refused += isinstance(want, str)
    assert refused


def test_overflow_is_looked_for_in_debug_mode_only() -> None:
    """Without it Triton makes the check of every sum, and drops its outcome."""
    options = core.interpreter_builder.options
    assert options.sanitize_overflow == options.debug == core.InterpreterOptions().debug
