"""Benchmark of Gaussian Soft-NMS.

Boxes crowd around objects, eight to each, as a detector finds them before suppression; scores are
drawn at random. No peer has Soft-NMS on a GPU. "eager" is the definition in torch operations, all
classes at a time, a box of each per step; "numpy" the library's reference on the CPU, copies there
and back included. They answer with the decayed scores, best first.

Bytes: boxes, scores and classes are read, indices and scores are written. Operations: 18 per
selected box and box of its class (14 of the IoU, 4 of the decay and the maximum).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dlops_triton import _settings, soft_nms
from dlops_triton.reference import soft_nms as reference

from .bench import AbsentError, Arrays, Bench, Case, Inputs, Sizes, Work

SIGMA, LOWEST = 0.5, 0.001
_PER_OBJECT = 8


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The classes one after another, of equal size."""
    n, classes = case.sizes["n"], case.sizes.get("classes", 1)
    rng = np.random.default_rng(0)
    objects = max(1, n // classes // _PER_OBJECT)
    place = rng.uniform(0, 1333, (classes, objects, 2))
    side = rng.uniform(30, 200, (classes, objects, 2))
    which = rng.integers(0, objects, (classes, n // classes))[..., None]
    place, side = (np.take_along_axis(a, which, 1).reshape(n, 2) for a in (place, side))
    corner = place + rng.uniform(-0.3, 0.3, (n, 2)) * side
    boxes = np.concatenate([corner, corner + side], axis=1)
    made = {
        "boxes": torch.tensor(boxes, dtype=dtype, device=device),
        "scores": torch.tensor(rng.uniform(0.05, 1, n), dtype=dtype, device=device),
    }
    if "classes" in case.sizes:
        made["idxs"] = torch.arange(classes, device=device).repeat_interleave(n // classes)
    return made


def formula(boxes: Tensor, scores: Tensor, classes: int) -> Tensor:
    """The definition, one step of all classes at a time; the loop ends when no class has a box."""
    x1, y1, x2, y2 = boxes.view(classes, -1, 4).unbind(2)
    area = (x2 - x1) * (y2 - y1)
    current = scores.clone().view(classes, -1)
    taken = []
    while True:
        best, which = current.max(1, keepdim=True)
        if not bool((best > LOWEST).any()):
            break
        taken.append(best)
        px1, py1, px2, py2, p_area = (t.gather(1, which) for t in (x1, y1, x2, y2, area))
        w = torch.minimum(px2, x2) - torch.maximum(px1, x1)
        h = torch.minimum(py2, y2) - torch.maximum(py1, y1)
        inter = w.clamp_(min=0) * h.clamp_(min=0)
        iou = inter / (p_area + area - inter)
        current = (current * torch.exp(-iou * iou / SIGMA)).scatter(1, which, 0)
    found = torch.cat(taken, 1).flatten()
    return found[found > LOWEST].sort(descending=True).values


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    options = {"sigma": SIGMA, "score_threshold": LOWEST, "idxs": i.get("idxs")}
    return lambda: soft_nms(i["boxes"], i["scores"], **options)[1]  # type: ignore[arg-type]


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    classes = case.sizes.get("classes", 1)
    return lambda: formula(i["boxes"], i["scores"], classes)


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    raise AbsentError("torch.compile takes no loop whose length depends on data")


def _numpy(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: torch.from_numpy(_decayed({k: t.cpu() for k, t in i.items()})).to(i["scores"])


def _decayed(i: Inputs) -> np.typing.NDArray[np.float64]:
    arrays = {name: t.numpy() for name, t in i.items()}
    _, scores = reference.soft_nms(
        arrays["boxes"],
        arrays["scores"],
        sigma=SIGMA,
        score_threshold=LOWEST,
        idxs=arrays.get("idxs"),
    )
    return scores


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    return (_decayed(i),)


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    return (6 * itemsize + 8 + (8 if "classes" in case.sizes else 0)) * case.sizes["n"]


def _operations(case: Case, mode: str) -> int:
    return int(18 * _pairs(case.sizes))


def _pairs(sizes: Sizes) -> float:
    """Nearly all boxes are selected, each while those after it are left."""
    return sizes["n"] ** 2 / sizes.get("classes", 1) / 2


def _worked(sizes: Sizes) -> float:
    """A selection looks at all lanes of its program; what is not in them is swept over besides."""
    size: int = _settings.ALL["soft_nms"].on(torch.empty(0))["SIZE"]
    of_class = sizes["n"] // sizes.get("classes", 1)
    lanes = min(size, 1 << max(5, (of_class - 1).bit_length()))
    swept = of_class if of_class > size else 0
    return float(sizes["n"] * (lanes + swept))


def _case(name: str, n: int, small_n: int, **classes: int) -> Case:
    sizes, small = {"n": n, **classes}, {"n": small_n, **classes}
    return Case(name, sizes, small, dtypes=("fp32",), modes=("fwd",))


BENCH = Bench(
    name="soft_nms",
    cases=(
        _case("5k", 5_000, 1_048),
        _case("1k", 1_000, 600),
        _case("80-classes-1k-each", 80_000, 41_600, classes=80),
    ),
    small=(_case("128", 128, 80), _case("512", 512, 272)),
    sweep=(_case("2k", 2_048, 1_040), _case("10k", 10_000, 1_040)),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile, "numpy": _numpy},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        "soft_nms": {"SIZE": (512, 1024, 2048), "CHUNK": (16, 32, 64), "num_warps": (4, 8, 16)}
    },
    kernels={"soft_nms_kernel": Work(elements=_worked, block=lambda k: k["SIZE"], loop=True)},
    torch_kernels=lambda sizes: 16 if "classes" in sizes else 12,
    capturable=False,
)
