"""What torch.vmap does with an op: the rules that `_dispatch.register` is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of the op, how many calls there are, the dimension of each argument that counts them, the
# arguments; to the results, and the dimension that counts them there.
Rule = Callable[..., tuple[Any, int]]


def loop(op: Any, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, int]:
    """Call the op for one after another, and stack the results."""

    def one(value: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [one(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    def stack(results: Sequence[Any]) -> Any:
        if isinstance(results[0], Tensor):
            return torch.stack(list(results))
        return type(results[0])(stack(part) for part in zip(*results, strict=True))

    if info.batch_size == 0:
        raise ValueError(f"torch.vmap of {op} needs a dimension of at least 1, got 0")
    each = range(info.batch_size)
    return stack([op(*(one(a, d, i) for a, d in zip(args, dims, strict=True))) for i in each]), 0


def leading(tensors: int, when: Callable[..., bool] = lambda *_: True) -> Rule:
    """The rule of an op whose first arguments, so many, and results may have leading dimensions.

    ``when`` says of those tensors, with the dimension, and of the other arguments, if they may.
    """

    def rule(op: Any, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, int]:
        first, others = _in_front(tensors, info, dims, args), args[tensors:]
        return (op(*first, *others), 0) if when(first, *others) else loop(op, info, dims, *args)

    return rule


def merged(tensors: int) -> Rule:
    """The rule of an op whose first arguments, so many, and results have one leading dimension."""

    def rule(op: Any, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, int]:
        first = _in_front(tensors, info, dims, args)
        results = op(*(None if t is None else t.flatten(0, 1) for t in first), *args[tensors:])
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in results), 0

    return rule


def refused(why: str) -> Rule:
    """The rule of an op that can have none."""

    def rule(*_: Any) -> Any:
        raise RuntimeError(why)

    return rule


def _in_front(tensors: int, info: Any, dims: Sequence[Any], args: Any) -> list[Tensor | None]:
    first: list[Tensor | None] = []
    for t, dim in zip(args[:tensors], dims, strict=False):
        if t is not None:
            t = t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        first.append(t)
    return first
