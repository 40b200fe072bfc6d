"""Benchmark of greedy NMS, on boxes of which the number kept is known by construction.

"clusters": every object has equally many candidate boxes around it, any two of which overlap by
more than the threshold, and objects do not touch. One box per object is kept. Objects of different
classes lie on top of each other. "staircase": each box overlaps by more than the threshold with
the next one only, so every other box is kept, and each decision hangs on the one before: the worst
case of every parallel method. Coordinates are whole numbers, for which fp32 IoU arithmetic is exact
in any order, so all providers must agree to the last index.

Bytes: boxes, scores and classes are read, indices are written. Operations: 11 per pair of a kept
box and a later one of its class, which any method that compares boxes with kept boxes must do.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dlops_triton import _nms, _settings, batched_nms, nms
from dlops_triton.reference import nms as reference

from .bench import AbsentError, Arrays, Bench, Case, Inputs, Sizes, Work, optional

THRESHOLD = 0.5
_SIDE, _JITTER, _PITCH, _STEP = 64, 4, 96, 16
_EAGER_LIMIT = 20_000  # boxes; the eager formula holds several fp32 matrices, N x N each


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    n, kept, classes = case.sizes["n"], case.sizes["kept"], case.sizes.get("classes", 1)
    rng = np.random.default_rng(0)
    box = np.arange(n)
    if case.option == "staircase":
        corner = np.stack([box * _STEP, 0 * box], axis=1)
        boxes = np.concatenate([corner, corner + _SIDE], axis=1)
        rank = box
    else:
        place = box % kept // classes
        columns = math.ceil(math.sqrt(kept / classes))
        corner = np.stack([place % columns, place // columns], axis=1) * _PITCH + _JITTER
        boxes = np.concatenate([corner, corner + _SIDE], axis=1)
        boxes = boxes + rng.integers(-_JITTER, _JITTER + 1, boxes.shape)
        rank = rng.permutation(n)
    made = {
        "boxes": torch.tensor(boxes, dtype=dtype, device=device),
        "scores": torch.tensor(1 - rank / n, dtype=dtype, device=device),
    }
    if "classes" in case.sizes:
        made["idxs"] = torch.tensor(box % kept % classes, device=device)
    return made


def formula(boxes: Tensor, scores: Tensor, idxs: Tensor | None) -> Tensor:
    """The matrix of all pairs, then the fixed point of "kept unless a kept box suppresses it"."""
    order = torch.sort(scores, descending=True, stable=True).indices
    x1, y1, x2, y2 = boxes[order].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    w = torch.minimum(x2[:, None], x2) - torch.maximum(x1[:, None], x1)
    h = torch.minimum(y2[:, None], y2) - torch.maximum(y1[:, None], y1)
    inter = w.clamp_(min=0) * h.clamp_(min=0)
    hit = (inter / (area[:, None] + area - inter) > THRESHOLD).triu_(1)
    if idxs is not None:
        hit &= idxs[order][:, None] == idxs[order]
    keep = torch.ones_like(order, dtype=torch.bool)
    while True:
        after = ~(hit & keep[:, None]).any(0)
        if torch.equal(after, keep):
            return order[keep]
        keep = after


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    if "idxs" in i:
        return lambda: batched_nms(i["boxes"], i["scores"], i["idxs"], THRESHOLD)
    return lambda: nms(i["boxes"], i["scores"], THRESHOLD)


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    if case.sizes["n"] > _EAGER_LIMIT:
        raise AbsentError(f"its N x N matrices are made for at most {_EAGER_LIMIT} boxes")
    return lambda: formula(i["boxes"], i["scores"], i.get("idxs"))


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    raise AbsentError("torch.compile takes no loop whose length depends on data")


def _torchvision(case: Case, i: Inputs) -> Callable[[], Tensor]:
    peer = optional("torchvision.ops")
    if "idxs" in i:
        return lambda: peer.batched_nms(i["boxes"], i["scores"], i["idxs"], THRESHOLD)
    return lambda: peer.nms(i["boxes"], i["scores"], THRESHOLD)


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    idxs = i["idxs"].numpy() if "idxs" in i else None
    return (reference.nms(i["boxes"].numpy(), i["scores"].numpy(), THRESHOLD, idxs=idxs),)


def _known(case: Case, i: Inputs) -> Tensor:
    """The best of each cluster, or every other stair, by descending score."""
    order = torch.sort(i["scores"], descending=True, stable=True).indices
    if case.option == "staircase":
        return order[::2]
    cluster = order % case.sizes["kept"]  # as ``make`` deals the boxes out
    rank = torch.arange(len(order), device=order.device)
    first = torch.full((case.sizes["kept"],), len(order), device=order.device)
    best = first.scatter_reduce(0, cluster, rank, "amin")
    return order[best.sort().values]


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    per_box = 5 * itemsize + (8 if "classes" in case.sizes else 0)
    return per_box * case.sizes["n"] + 8 * case.sizes["kept"]


def _operations(case: Case, mode: str) -> int:
    n, kept = case.sizes["n"], case.sizes["kept"]
    return 11 * (kept * n - kept * (kept + 1) // 2) // case.sizes.get("classes", 1)


def _case(
    name: str, n: int, kept: int, small_n: int, option: str = "clusters", **classes: int
) -> Case:
    small = {"n": small_n, "kept": max(1, kept * small_n // n), **classes}
    sizes = {"n": n, "kept": kept, **classes}
    return Case(name, sizes, small, dtypes=("fp32",), modes=("fwd",), option=option)


# The pairs that the kernels look at. A program of the first tier compares each of its blocks with
# the list of kept boxes and, all of its lanes, with each box of the block. In a band every block
# meets itself and the earlier ones; then the band's kept boxes meet all later ones.


def _block(setting: str) -> int:
    block: int = _settings.ALL[setting].on(torch.empty(0))["BLOCK"]
    return block


def _of_programs(setting: str) -> Callable[[Sizes], float]:
    def pairs(sizes: Sizes) -> float:
        n, kept, classes = sizes["n"], sizes["kept"], sizes.get("classes", 1)
        return _block(setting) * n + kept / classes * n / 2

    return pairs


def _bands(sizes: Sizes) -> list[tuple[int, int]]:
    """Start and end of each."""
    n, band = sizes["n"], _nms.band(sizes["n"])
    return [(start, min(start + band, n)) for start in range(0, n, band)]


def _near(sizes: Sizes) -> float:
    blocks = (math.ceil((end - start) / _block("nms_mask")) for start, end in _bands(sizes))
    return _block("nms_mask") ** 2 * sum(b * (b + 1) / 2 for b in blocks)


def _far(sizes: Sizes) -> float:
    share = sizes["kept"] / sizes["n"]
    return sum(share * (end - start) * (sizes["n"] - end) for start, end in _bands(sizes))


def _torch_kernels(sizes: Sizes) -> int:
    """Sorting and gathering, by classes once more, and selecting."""
    if sizes["n"] <= _nms.SORTED_BY_ONE:
        return 1
    return 18 if "classes" in sizes else 12


@contextlib.contextmanager
def _shrunk() -> Iterator[None]:
    """Small cases take the tiers of the cases they stand for, in bands of the least size."""
    with (
        mock.patch.object(_nms, "SORTED_BY_ONE", 1040),  # the small case of 2,000 boxes
        mock.patch.object(_nms, "ONE_BAND", 2048),
        mock.patch.object(_nms, "MASK_BYTES", 1),
        mock.patch.object(_nms, "LARGEST_SEGMENT", 10**9),
    ):
        yield


def _tile(constants: Mapping[str, int]) -> int:
    return constants["ROWS"] * constants["BLOCK"]


_SWEPT = ((1_000, 520), (10_000, 1_072), (100_000, 3_136), (1_000_000, 3_136))

BENCH = Bench(
    name="nms",
    cases=(
        _case("1k-keep-100", 1_000, 100, 520),
        _case("10k-keep-1k", 10_000, 1_000, 1_072),
        _case("100k-keep-10k", 100_000, 10_000, 3_136),
        _case("20k-80-classes-keep-2k", 20_000, 2_000, 1_280, classes=80),
        _case("lvis-20k-1203-classes", 20_000, 6_000, 1_280, classes=1_203),
        _case("8x80x1000-keep-128k", 640_000, 128_000, 2_560, classes=640),
    ),
    small=(_case("128-keep-16", 128, 16, 96), _case("512-keep-64", 512, 64, 272)),
    sweep=(
        *(
            _case(f"{n}-keep-{n * percent // 100}", n, n * percent // 100, small)
            for n, small in _SWEPT
            for percent in (1, 30, 100)
        ),
        _case("2000-keep-tenth", 2_000, 200, 1_040),
        *(_case(f"{n}-keep-tenth", n, n // 10, 1_072) for n in (4_000, 16_000)),
        *(_case(f"{n}-keep-tenth", n, n // 10, 3_136) for n in (64_000, 256_000, 1_000_000)),
        _case("1k-staircase", 1_000, 500, 520, option="staircase"),
        _case("10k-staircase", 10_000, 5_000, 1_072, option="staircase"),
        _case("100k-staircase", 100_000, 50_000, 3_136, option="staircase"),
    ),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile, "torchvision": _torchvision},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        "nms_small": {"BLOCK": (128, 256, 512), "ROWS": (2, 4, 8), "num_warps": (4, 8)},
        "nms_segments": {
            "BLOCK": (128, 256, 512),
            "ROWS": (4, 8),
            "CHUNK": (32, 64, 128),
            "num_warps": (2, 4),
        },
        "nms_mask": {"BLOCK": (256, 512, 1024), "ROWS": (2, 4, 8), "num_warps": (4, 8)},
        "nms_resolve": {"WORDS": (8, 16, 32), "num_warps": (8, 16)},
        "nms_suppress": {
            "BLOCK": (256, 512),
            "ROWS": (2, 4, 8),
            "SHARE": (128, 256, 1024),
            "num_warps": (4, 8),
        },
    },
    kernels={
        "nms_small_kernel": Work(elements=_of_programs("nms_small"), block=_tile, loop=True),
        "nms_segments_kernel": Work(elements=_of_programs("nms_segments"), block=_tile, loop=True),
        "nms_list_kernel": Work(elements=lambda s: s["n"], block=lambda k: k["BLOCK"]),
        "nms_mask_kernel": Work(elements=_near, block=_tile, loop=True),
        "nms_resolve_kernel": Work(  # an element is a word of 32 pairs
            elements=lambda s: _near(s) / 32,
            block=lambda k: k["WORDS"] * k["BLOCK"],
            loop=True,
        ),
        "nms_suppress_kernel": Work(elements=_far, block=_tile, loop=True),
    },
    torch_kernels=_torch_kernels,
    exact=True,
    known=_known,
    capturable=False,
    shrunk=_shrunk,
)
