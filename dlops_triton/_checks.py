"""Checks of arguments: metadata only, before anything is launched. No data is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INDICES = (torch.int64, torch.int32)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# torch.export traces sizes as symbolic numbers.
_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if distributed(value):
        raise TypeError(
            f"{name} must be a tensor of this process, got a DTensor: pass {name}.full_tensor(), "
            f"or {name}.to_local() for this rank's part"
        )


def distributed(value: object) -> bool:
    """Whether it is a DTensor, asked without the import of what that is."""
    return hasattr(value, "device_mesh")


def dtype(name: str, value: Tensor, accepted: Sequence[torch.dtype] = FLOATS) -> None:
    if value.dtype not in accepted:
        names = ", ".join(str(d).removeprefix("torch.") for d in accepted)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {value.dtype}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def boxes(name: str, value: object, batched: bool = False) -> None:
    """[N, 4] floats; with ``batched`` any leading dimensions."""
    tensor(name, value)
    assert isinstance(value, Tensor)
    shape = "[..., N, 4]" if batched else "[N, 4]"
    if value.dim() < 2 or (value.dim() > 2 and not batched) or value.shape[-1] != 4:
        raise ValueError(f"{name} must have shape {shape} (xyxy), got {tuple(value.shape)}")
    dtype(name, value)


def images(name: str, value: object) -> None:
    """Boxes of several images, [B, N, 4]."""
    boxes(name, value, batched=True)
    assert isinstance(value, Tensor)
    if value.dim() != 3:
        raise ValueError(f"{name} must have shape [B, N, 4] (xyxy), got {tuple(value.shape)}")


def detections(boxes: Tensor, scores: object, idxs: object = None, valid: object = None) -> None:
    """A score and perhaps a class per box, and perhaps a number of boxes per image."""
    if boxes.shape[-2] >= 2**31:
        raise ValueError(f"boxes must be fewer than 2**31, got {boxes.shape[-2]}")
    of_box, of_image = tuple(boxes.shape[:-1]), tuple(boxes.shape[:-2])
    for name, value, shape, accepted, per in (
        ("scores", scores, of_box, FLOATS, "box"),
        ("idxs", idxs, of_box, INDICES, "box"),
        ("valid", valid, of_image, INDICES, "image"),
    ):
        if value is None and name != "scores":
            continue
        tensor(name, value)
        assert isinstance(value, Tensor)
        dtype(name, value, accepted)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape}, one per {per}, got {tuple(value.shape)}"
            )
        same_device(name, value, "boxes", boxes)


def choice(name: str, value: object, accepted: Sequence[object]) -> None:
    for a in accepted:
        if type(value) is type(a) and value == a:
            return
    options = ", ".join(repr(a) for a in accepted)
    raise ValueError(f"{name} must be one of {options}, got {value!r}")


def number(name: str, value: object, low: float, high: float, accepted: str) -> None:
    """A finite number in [low, high]; ``accepted`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number {accepted}, got {type(value).__name__} {value!r}")
    # Comparisons only: torch.compile with dynamic shapes cannot trace math.isfinite.
    if not (low <= value <= high and -math.inf < value < math.inf):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def integer(name: str, value: object, low: int, high: int, accepted: str) -> None:
    """An integer in [low, high]; ``accepted`` says so in words."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def avg_factor(value: object, inputs: Tensor, reduction: str) -> None:
    """The divisor of "mean": None, a positive number, or a tensor of one element."""
    if value is None:
        return
    if reduction != "mean":
        raise ValueError(f"avg_factor needs reduction='mean', got reduction={reduction!r}")
    if not isinstance(value, Tensor):
        number("avg_factor", value, 2**-1074, float("inf"), "above 0 and finite")
        return
    dtype("avg_factor", value, (*INTEGERS, *FLOATS))
    same_device("avg_factor", value, "inputs", inputs)
    if value.numel() != 1:
        raise ValueError(f"avg_factor must have one element, got shape {tuple(value.shape)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError("avg_factor must not require a gradient (it gets none): detach it")


def score_threshold(value: object, scores: Tensor) -> float:
    """A finite number, rounded to fp32 unless the scores are fp64."""
    number("score_threshold", value, -float("inf"), float("inf"), "finite")
    threshold = float(value)  # type: ignore[arg-type]
    if scores.dtype == torch.float64:
        return threshold
    largest = np.finfo(np.float32).max
    return float(np.float32(np.clip(threshold, -largest, largest)))
