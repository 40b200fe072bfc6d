"""Benchmark of box_match, the assignment of anchors to ground truth.

Corners are whole numbers, for which fp32 areas are exact in any order, so that all providers must
agree to the last anchor. The peers build the N x M matrix.

Bytes: both sets of boxes are read, an index and an IoU per anchor are written. Operations: 8 per
pair, to find that two boxes do not meet: of most no more is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dlops_triton import box_match
from dlops_triton.reference import match as reference

from .bench import Arrays, Bench, Case, Inputs, Work, compiled

POSITIVE, NEGATIVE, LEAST = 0.5, 0.4, 0.0


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Anchors and objects of 16 to 271 pixels a side, anywhere in an image of 1333 x 800."""
    g = torch.Generator(device).manual_seed(0)

    def boxes(count: int) -> Tensor:
        def draw(high: int) -> Tensor:
            return torch.randint(high, (count, 1), generator=g, device=device)

        corner = torch.cat([draw(1333), draw(800)], 1)
        side = torch.cat([draw(256), draw(256)], 1) + 16
        return torch.cat([corner, corner + side], 1).to(dtype)

    return {"anchors": boxes(case.sizes["n"]), "gt": boxes(case.sizes["m"])}


def formula(anchors: Tensor, gt: Tensor) -> Tensor:
    """MaxIoUAssigner's rule on the whole matrix, without its loop over objects."""
    low = torch.maximum(anchors[:, None, :2], gt[None, :, :2])
    high = torch.minimum(anchors[:, None, 2:], gt[None, :, 2:])
    side = (high - low).clamp(min=0)
    inter = side[..., 0] * side[..., 1]
    area_a, area_b = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (anchors, gt))
    iou = inter / (area_a[:, None] + area_b - inter)
    best, which = iou.max(1)
    matched = torch.where(best < NEGATIVE, -1, -2)
    matched = torch.where(best >= POSITIVE, which, matched)
    highest = iou.amax(0)
    own = (iou == highest) & (highest >= LEAST)
    last = torch.where(own, torch.arange(gt.shape[0], device=gt.device), -1).amax(1)
    return torch.where(last >= 0, last, matched)


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: box_match(
        i["anchors"], i["gt"], pos_iou=POSITIVE, neg_iou=NEGATIVE, min_pos_iou=LEAST
    )[0]


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: formula(i["anchors"], i["gt"])


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: compiled(formula)(i["anchors"], i["gt"])


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    matched, _ = reference.box_match(
        i["anchors"].numpy(),
        i["gt"].numpy(),
        pos_iou=POSITIVE,
        neg_iou=NEGATIVE,
        min_pos_iou=LEAST,
        match_low_quality=True,
    )
    return (matched,)


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    return 4 * itemsize * (case.sizes["n"] + case.sizes["m"]) + 12 * case.sizes["n"]


def _operations(case: Case, mode: str) -> int:
    return 8 * case.sizes["n"] * case.sizes["m"]


def _tile(constants: Mapping[str, int]) -> int:
    return constants["BLOCK_N"] * constants["BLOCK_M"]


_PAIRS = Work(elements=lambda s: s["n"] * s["m"], block=_tile, loop=True)


def _case(name: str, n: int, m: int, small_n: int) -> Case:
    small = {"n": small_n, "m": m}
    return Case(name, {"n": n, "m": m}, small, dtypes=("fp32",), modes=("fwd",))


BENCH = Bench(
    name="match",
    cases=(
        _case("anchors-200k-100", 200_000, 100, 320),
        _case("anchors-200k-300", 200_000, 300, 320),
        _case("proposals-2k-20", 2_000, 20, 336),
    ),
    small=(_case("256x16", 256, 16, 128),),
    sweep=tuple(_case(f"{n}x100", n, 100, 320) for n in (8_192, 32_768, 131_072)),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        name: {"BLOCK_N": (64, 128, 256), "BLOCK_M": (2, 4, 8), "num_warps": (1, 2)}
        for name in ("match", "match_low_quality")
    },
    kernels={"match_kernel": _PAIRS, "match_low_quality_kernel": _PAIRS},
    torch_kernels=lambda sizes: 1,  # zeros
    exact=True,
)
