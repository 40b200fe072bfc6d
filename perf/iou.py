"""Benchmark of the pairwise box IoU, and of GIoU.

Bytes: forward reads both sets of boxes and writes a value per pair; backward reads a gradient per
pair and the boxes again, and writes their gradients. Operations per pair: 14 forward (8 for the
overlap, 2 for the union, 4 for the quotient), 52 with the gradient (those 14 again, 24 for the
shares of the coordinates of both boxes and their sums, the areas); for GIoU 24 and 84.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dlops_triton import box_iou, generalized_box_iou
from dlops_triton.reference import iou as reference

from .bench import Arrays, Bench, Case, Inputs, Work, compiled, optional


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Boxes of 8 to 264 pixels a side, anywhere in an image of 1333 x 800."""
    n, m = case.sizes["n"], case.sizes["m"]
    g = torch.Generator(device).manual_seed(0)
    image = torch.tensor([1333.0, 800.0], device=device)

    def boxes(count: int) -> Tensor:
        corner = torch.rand(count, 2, generator=g, device=device) * image
        side = torch.rand(count, 2, generator=g, device=device) * 256 + 8
        return torch.cat([corner, corner + side], dim=1).to(dtype)

    grad = torch.randn(n, m, generator=g, dtype=dtype, device=device)
    return {"boxes1": boxes(n), "boxes2": boxes(m), "grad": grad}


def formula(boxes1: Tensor, boxes2: Tensor, kind: str = "") -> Tensor:
    a = boxes1 if boxes1.dtype == torch.float64 else boxes1.float()
    b = boxes2.to(a.dtype)
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    side = (high - low).clamp(min=0)
    inter = side[..., 0] * side[..., 1]
    union = _area(a)[:, None] + _area(b) - inter
    iou = inter / union
    if kind == "giou":
        low = torch.minimum(a[:, None, :2], b[None, :, :2])
        high = torch.maximum(a[:, None, 2:], b[None, :, 2:])
        hull = (high - low).prod(2)
        iou = iou - (hull - union) / hull
    return iou.to(boxes1.dtype)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    iou = generalized_box_iou if case.option == "giou" else box_iou
    return lambda: iou(i["boxes1"], i["boxes2"])


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: formula(i["boxes1"], i["boxes2"], case.option)


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: compiled(formula)(i["boxes1"], i["boxes2"], case.option)


def _torchvision(case: Case, i: Inputs) -> Callable[[], Tensor]:
    peer = optional("torchvision.ops")
    iou = peer.generalized_box_iou if case.option == "giou" else peer.box_iou
    return lambda: iou(i["boxes1"], i["boxes2"])


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    a, b, grad = (i[name].float().numpy() for name in ("boxes1", "boxes2", "grad"))
    if case.option == "giou":
        iou = reference.box_penalized(a, b, "giou")
        both = (iou, *reference.box_penalized_grad(a, b, grad, "giou"))
    else:
        iou = reference.box_iou(a, b)
        both = (iou, *reference.box_iou_grad(a, b, grad))
    return (iou,) if mode == "fwd" else both


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    n, m = case.sizes["n"], case.sizes["m"]
    pairs, boxes = itemsize * n * m, itemsize * 4 * (n + m)
    return pairs + boxes if mode == "fwd" else 2 * pairs + 3 * boxes


def _operations(case: Case, mode: str) -> int:
    per_pair = {"": {"fwd": 14, "fwd+bwd": 52}, "giou": {"fwd": 24, "fwd+bwd": 84}}
    return per_pair[case.option][mode] * case.sizes["n"] * case.sizes["m"]


def _tile(constants: Mapping[str, int]) -> int:
    return constants["BLOCK_N"] * constants["BLOCK_M"]


def _case(n: int) -> Case:
    return Case(f"{n}x{n}", {"n": n, "m": n}, {"n": 128, "m": 128}, dtypes=("fp32",))


BENCH = Bench(
    name="iou",
    cases=(
        Case("proposals-20k-1k", {"n": 20_000, "m": 1_000}, {"n": 160, "m": 120}),
        Case("square-10k", {"n": 10_000, "m": 10_000}, {"n": 144, "m": 144}),
        Case("anchors-200k-100", {"n": 200_000, "m": 100}, {"n": 224, "m": 100}),
        Case("giou-20k-1k", {"n": 20_000, "m": 1_000}, {"n": 160, "m": 120}, option="giou"),
    ),
    small=tuple(map(_case, (256, 512))),
    sweep=tuple(map(_case, (1024, 2048, 4096, 8192))),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile, "torchvision": _torchvision},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        "iou_fwd": {"BLOCK_N": (8, 16, 32), "BLOCK_M": (64, 128, 256), "num_warps": (4, 8)},
        "iou_bwd": {
            "BLOCK_N": (8, 16, 32),
            "BLOCK_M": (32, 64),
            "num_warps": (4, 8),
            "programs": (512, 2048),
        },
        "iou_penalty_fwd": {"BLOCK_N": (8, 16), "BLOCK_M": (32, 64, 128), "num_warps": (4, 8)},
        "iou_penalty_bwd": {
            "BLOCK_N": (8, 16, 32),
            "BLOCK_M": (32, 64),
            "num_warps": (4, 8),
            "programs": (512, 2048),
        },
    },
    kernels={
        "box_iou_fwd_kernel": Work(block=_tile, elements=lambda s: s["n"] * s["m"]),
        "box_iou_bwd_kernel": Work(
            elements=lambda s: 2 * s["n"] * s["m"],  # launched for either set of boxes
            block=_tile,
            loop=True,
        ),
        "box_iou_penalty_bwd_kernel": Work(
            elements=lambda s: 2 * s["n"] * s["m"], block=_tile, loop=True
        ),
    },
    leaves=("boxes1", "boxes2"),
)
