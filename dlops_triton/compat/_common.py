"""What the namespaces share."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def ignored(function: F) -> F:
    """Leave ``function`` to Python in a scripted model."""
    decorated: F = torch.jit.ignore(function)
    return decorated


def renamed(**names: str) -> Callable[[F], F]:
    """Take keyword arguments by their older names as well, with a warning."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{old} is the older name of {new}: pass one of them")
                    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def class_ids(idxs: Tensor) -> Tensor:
    """Classes of any dtype as the ops take them; of equal numbers equal ones."""
    if idxs.dtype in (torch.int64, torch.int32):
        return idxs
    return idxs.unique(return_inverse=True)[1] if idxs.is_floating_point() else idxs.long()


def aligned_overlaps(
    boxes1: Tensor, boxes2: Tensor, mode: str, offset: float, eps: float
) -> Tensor:
    """IoU, IoF or GIoU of pairs of boxes, [..., 4] each: [...]. No denominator is below ``eps``."""
    size1 = boxes1[..., 2:] - boxes1[..., :2] + offset
    size2 = boxes2[..., 2:] - boxes2[..., :2] + offset
    low, high = (
        torch.max(boxes1[..., :2], boxes2[..., :2]),
        torch.min(boxes1[..., 2:], boxes2[..., 2:]),
    )
    inter = (high - low + offset).clamp(min=0).prod(-1)
    union = size1.prod(-1)
    if mode != "iof":
        union = union + size2.prod(-1) - inter
    union = union.clamp(min=eps)
    overlap = inter / union
    if mode != "giou":
        return overlap
    low, high = (
        torch.min(boxes1[..., :2], boxes2[..., :2]),
        torch.max(boxes1[..., 2:], boxes2[..., 2:]),
    )
    hull = (high - low + offset).clamp(min=0).prod(-1).clamp(min=eps)
    return overlap - (hull - union) / hull
