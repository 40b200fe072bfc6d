"""Benchmark of the elementwise box losses, averaged.

Bytes: both boxes of a pair are read, and once more for the gradient of the first, which is written.
Operations per pair: those of the leanest formulation, for GIoU 30 and with the gradient 90, for
CIoU, with its two arc tangents, 70 and 180.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dlops_triton import complete_box_iou_loss, generalized_box_iou_loss
from dlops_triton.reference import iou_loss as reference

from .bench import Arrays, Bench, Case, Inputs, Work, compiled, optional

EPS = 1e-7
_LOSSES: dict[str, Callable[..., Tensor]] = {
    "giou": generalized_box_iou_loss,
    "ciou": complete_box_iou_loss,
}


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Predictions some pixels off, of boxes of 8 to 264 pixels a side."""
    g = torch.Generator(device).manual_seed(0)
    n = case.sizes["n"]
    corner = torch.rand(n, 2, generator=g, device=device) * 1000
    side = torch.rand(n, 2, generator=g, device=device) * 256 + 8
    boxes = torch.cat([corner, corner + side], 1)
    off = torch.randn(n, 4, generator=g, device=device) * 4
    return {"boxes1": (boxes + off).to(dtype), "boxes2": boxes.to(dtype)}


def _giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    iou, union, low, high = _overlap(boxes1, boxes2)
    hull = (high - low).prod(1)
    return (1 - iou + (hull - union) / (hull + EPS)).mean()


def _ciou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    iou, _, low, high = _overlap(boxes1, boxes2)
    diagonal = (high - low).square().sum(1) + EPS
    apart = (_centre(boxes1) - _centre(boxes2)).square().sum(1)
    w1, h1, w2, h2 = (boxes[:, k + 2] - boxes[:, k] for boxes in (boxes1, boxes2) for k in (0, 1))
    v = 4 / math.pi**2 * (torch.atan(w2 / h2) - torch.atan(w1 / h1)).square()
    alpha = (v / (1 - iou + v + EPS)).detach()
    return (1 - iou + apart / diagonal + alpha * v).mean()


def _overlap(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low = torch.maximum(boxes1[:, :2], boxes2[:, :2])
    high = torch.minimum(boxes1[:, 2:], boxes2[:, 2:])
    inter = (high - low).clamp(min=0).prod(1)
    union = sum((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes1, boxes2)) - inter
    hull_low = torch.minimum(boxes1[:, :2], boxes2[:, :2])
    hull_high = torch.maximum(boxes1[:, 2:], boxes2[:, 2:])
    return inter / (union + EPS), union, hull_low, hull_high


def _centre(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def formula(boxes1: Tensor, boxes2: Tensor, kind: str) -> Tensor:
    wide = torch.promote_types(boxes1.dtype, torch.float32)
    return {"giou": _giou, "ciou": _ciou}[kind](boxes1.to(wide), boxes2.to(wide))


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: _LOSSES[case.option](i["boxes1"], i["boxes2"], "mean")


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: formula(i["boxes1"], i["boxes2"], case.option)


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: compiled(formula)(i["boxes1"], i["boxes2"], case.option)


def _torchvision(case: Case, i: Inputs) -> Callable[[], Tensor]:
    peer = optional("torchvision.ops")
    loss = {"giou": peer.generalized_box_iou_loss, "ciou": peer.complete_box_iou_loss}[case.option]
    return lambda: loss(i["boxes1"], i["boxes2"], "mean")


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    a, b = (i[name].float().numpy() for name in ("boxes1", "boxes2"))
    loss = reference.iou_loss(a, b, case.option)
    if mode == "fwd":
        return (loss.mean(),)
    share = 0 * loss + 1 / loss.size
    return loss.mean(), reference.iou_loss_grad(a, b, share, case.option)[0]


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    return {"fwd": 8, "fwd+bwd": 20}[mode] * itemsize * case.sizes["n"]


def _operations(case: Case, mode: str) -> int:
    per_pair = {"giou": {"fwd": 30, "fwd+bwd": 90}, "ciou": {"fwd": 70, "fwd+bwd": 180}}
    return per_pair[case.option][mode] * case.sizes["n"]


_PAIRS = Work(elements=lambda s: s["n"], block=lambda k: k["BLOCK"])


def _case(kind: str, n: int, small_n: int) -> Case:
    return Case(f"{kind}-{n}", {"n": n}, {"n": small_n}, dtypes=("bf16", "fp32"), option=kind)


BENCH = Bench(
    name="iou_loss",
    cases=(_case("ciou", 8_000, 320), _case("ciou", 200_000, 640), _case("giou", 200_000, 640)),
    small=(_case("ciou", 512, 256),),
    sweep=(_case("ciou", 2_000_000, 640),),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile, "torchvision": _torchvision},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        name: {"BLOCK": (128, 256, 512), "num_warps": (2, 4, 8)}
        for name in ("iou_loss_fwd", "iou_loss_bwd")
    },
    kernels={"iou_loss_fwd_kernel": _PAIRS, "iou_loss_bwd_kernel": _PAIRS},
    leaves=("boxes1",),
)
