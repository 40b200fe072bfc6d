"""What ``python -m dlops_triton check`` calls: every public op, with what the reference says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import dlops_triton as d

from . import _dispatch
from .reference import deform as deform_reference
from .reference import focal as focal_reference
from .reference import ghm as ghm_reference
from .reference import iou as iou_reference
from .reference import iou_loss as iou_loss_reference
from .reference import match as match_reference
from .reference import nms as nms_reference
from .reference import soft_nms as soft_nms_reference
from .reference import softmax_focal as softmax_focal_reference


class Output(NamedTuple):
    """One tensor that a call gave."""

    what: str
    got: Tensor
    want: npt.ArrayLike
    exact: bool = False
    # The terms of its sums were rounded to the dtype of the input, as tensor cores want them.
    rounded: bool = False


class Maker:
    """Makes the arguments of one call, the same ones each time.

    ``many``: compiled kernels take so many boxes that no single program sorts them; for the
    interpreter that would be too many.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, many: bool):
        self.device, self.dtype, self.many = device, dtype, many
        self._rng = np.random.default_rng(0)

    def tensor(self, values: npt.ArrayLike, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=dtype or self.dtype).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return self.tensor(self._rng.standard_normal(shape))

    def uniform(self, *shape: int) -> Tensor:
        return self.tensor(self._rng.random(shape))

    def scores(self, *shape: int) -> Tensor:
        """No two alike, as far as the dtype can tell."""
        n = int(np.prod(shape))
        return self.tensor(((self._rng.permutation(n) + 0.5) / n).reshape(shape))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return self.tensor(self._rng.integers(low, high, shape), torch.int64)

    def boxes(self, *shape: int) -> Tensor:
        corner = self._rng.random((*shape, 2)) * 100
        return self.tensor(
            np.concatenate([corner, corner + 5 + 35 * self._rng.random((*shape, 2))], -1)
        )


def _n(t: Tensor) -> npt.NDArray[Any]:
    return _dispatch.to_numpy(t.detach().cpu())


def _gradients(out: Tensor, grad: Tensor | None, **leaves: Tensor) -> list[tuple[str, Tensor]]:
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return [(f"gradient by {name}", g) for name, g in zip(leaves, found, strict=True)]


Outputs = Iterator[Output]


def _sigmoid_focal_loss(m: Maker) -> Outputs:
    x, soft, grad = m.normal(37, 11).requires_grad_(), m.uniform(37, 11), m.normal(37, 11)
    loss = d.sigmoid_focal_loss(x, soft)
    yield Output("loss", loss, focal_reference.sigmoid_focal_loss(_n(x), _n(soft)))
    slope = focal_reference.sigmoid_focal_loss_grad(_n(x), _n(soft))
    for what, got in _gradients(loss, grad, inputs=x):
        yield Output(what, got, slope * _n(grad))
    # Labels, reduced: kernels of their own.
    labels = m.integers(-1, 13, 37)
    total = d.sigmoid_focal_loss(x, labels, reduction="sum")
    yield Output("sum", total, focal_reference.sigmoid_focal_loss(_n(x), _n(labels)).sum())
    for what, got in _gradients(total, None, inputs=x):
        want = focal_reference.sigmoid_focal_loss_grad(_n(x), _n(labels))
        yield Output(f"{what} of the sum", got, want)


def _softmax_focal_loss(m: Maker) -> Outputs:
    x, labels, grad = m.normal(37, 11).requires_grad_(), m.integers(-1, 12, 37), m.normal(37)
    loss = d.softmax_focal_loss(x, labels, reduction="none")
    yield Output("loss", loss, softmax_focal_reference.softmax_focal_loss(_n(x), _n(labels)))
    slope = softmax_focal_reference.softmax_focal_loss_grad(_n(x), _n(labels))
    for what, got in _gradients(loss, grad, inputs=x):
        yield Output(what, got, slope * _n(grad)[:, None])


def _ghmc_loss(m: Maker) -> Outputs:
    x, labels = m.normal(37, 11).requires_grad_(), m.integers(-1, 12, 37)
    weight = m.integers(0, 3, 37).to(m.dtype)  # some do not count
    yield from _ghm(d.ghmc_loss(x, labels, weight), x, labels, weight, None)


def _ghmr_loss(m: Maker) -> Outputs:
    x, target = m.normal(37, 4).requires_grad_(), m.normal(37, 4)
    weight = m.integers(0, 3, 37, 4).to(m.dtype)
    yield from _ghm(d.ghmr_loss(x, target, weight), x, target, weight, 0.02)


def _ghm(loss: Tensor, x: Tensor, target: Tensor, weight: Tensor, mu: float | None) -> Outputs:
    each, slope, total, _, _ = ghm_reference.ghm_loss(_n(x), _n(target), _n(weight), mu)
    yield Output("loss", loss, each.sum() / total)
    for what, got in _gradients(loss, None, pred=x):
        yield Output(what, got, slope / total)


def _pairwise(op: str, kind: str) -> Callable[[Maker], Outputs]:
    """IoU, or one of its kin, of all pairs."""

    def case(m: Maker) -> Outputs:
        a, b = m.boxes(23).requires_grad_(), m.boxes(19).requires_grad_()
        grad = m.normal(23, 19)
        out = getattr(d, op)(a, b)
        if kind == "iou":
            want = iou_reference.box_iou(_n(a), _n(b))
            by_box = iou_reference.box_iou_grad(_n(a), _n(b), _n(grad))
        else:
            eps = 0.0 if kind == "giou" else 1e-7
            want = iou_reference.box_penalized(_n(a), _n(b), kind, eps=eps)
            by_box = iou_reference.box_penalized_grad(_n(a), _n(b), _n(grad), kind, eps=eps)
        yield Output(kind, out, want)
        for (what, got), wanted in zip(
            _gradients(out, grad, boxes1=a, boxes2=b), by_box, strict=True
        ):
            yield Output(what, got, wanted)

    return case


def _elementwise(op: str, kind: str) -> Callable[[Maker], Outputs]:
    """A loss of box and box."""

    def case(m: Maker) -> Outputs:
        a = m.boxes(41)
        b = (a + 4 * m.normal(41, 4)).requires_grad_()
        a = a.requires_grad_()
        grad = m.normal(41)
        loss = getattr(d, op)(a, b)
        yield Output("loss", loss, iou_loss_reference.iou_loss(_n(a), _n(b), kind))
        by_box = iou_loss_reference.iou_loss_grad(_n(a), _n(b), _n(grad), kind)
        for (what, got), wanted in zip(
            _gradients(loss, grad, boxes1=a, boxes2=b), by_box, strict=True
        ):
            yield Output(what, got, wanted)

    return case


def _box_match(m: Maker) -> Outputs:
    anchors, gt = m.boxes(67), m.boxes(9)
    options = {"pos_iou": 0.5, "neg_iou": 0.4, "min_pos_iou": 0.1, "match_low_quality": True}
    got = d.box_match(anchors, gt, **options)  # type: ignore[arg-type]
    want = match_reference.box_match(_n(anchors), _n(gt), **options)  # type: ignore[arg-type]
    for what, a, b in zip(("matched", "IoU"), got, want, strict=True):
        yield Output(what, a, b, exact=True)


def _nms(m: Maker) -> Outputs:
    for n in (67, 3001) if m.many else (67,):
        boxes, scores = m.boxes(n), m.scores(n)
        want = nms_reference.nms(_n(boxes), _n(scores), 0.5)
        yield Output(f"kept of {n}", d.nms(boxes, scores, 0.5), want, exact=True)


def _batched_nms(m: Maker) -> Outputs:
    for n in (67, 3001) if m.many else (67,):
        boxes, scores, idxs = m.boxes(n), m.scores(n), m.integers(0, 5, n)
        got = d.batched_nms(boxes, scores, idxs, 0.5)
        want = nms_reference.nms(_n(boxes), _n(scores), 0.5, idxs=_n(idxs))
        yield Output(f"kept of {n}", got, want, exact=True)


def _nms_padded(m: Maker) -> Outputs:
    boxes, scores, idxs = m.boxes(2, 37), m.scores(2, 37), m.integers(0, 3, 2, 37)
    got = d.nms_padded(boxes, scores, 0.5, idxs=idxs, max_output=30)
    want = nms_reference.nms_padded(_n(boxes), _n(scores), 0.5, idxs=_n(idxs), max_output=30)
    for what, a, b in zip(("indices", "counts"), got, want, strict=True):
        yield Output(what, a, b, exact=True)


# The order is compared exactly though exp is not exact: with these boxes and scores no two boxes
# that compete come closer than 2e-4, relatively.


def _soft_nms(m: Maker) -> Outputs:
    boxes, scores, idxs = m.boxes(67), m.scores(67), m.integers(0, 3, 67)
    got = d.soft_nms(boxes, scores, idxs=idxs, score_threshold=0.05)
    want = soft_nms_reference.soft_nms(_n(boxes), _n(scores), score_threshold=0.05, idxs=_n(idxs))
    yield Output("order", got[0], want[0], exact=True)
    yield Output("scores", got[1], want[1])


def _soft_nms_padded(m: Maker) -> Outputs:
    boxes, scores = m.boxes(2, 37), m.scores(2, 37)
    got = d.soft_nms_padded(boxes, scores, method="linear", max_output=20)
    want = soft_nms_reference.soft_nms_padded(
        _n(boxes), _n(scores), 0.3, 0.5, 0.001, "linear", max_output=20
    )
    yield Output("order", got[0], want[0], exact=True)
    yield Output("scores", got[1], want[1])
    yield Output("counts", got[2], want[2], exact=True)


_GEOMETRY = deform_reference.Geometry((3, 3), padding=(1, 1))


def _image(m: Maker, channels: int, groups: int) -> dict[str, Tensor]:
    """Offsets of some pixels, which lead outside as well, in ``groups``."""
    image = m.normal(2, channels, 4, 5).contiguous(memory_format=torch.channels_last)
    offset = m.tensor(2 * _n(m.normal(2, 18 * groups, 4, 5)))
    mask = m.uniform(2, 9 * groups, 4, 5)
    return {
        "input": image.requires_grad_(),
        "offset": offset.requires_grad_(),
        "mask": mask.requires_grad_(),
    }


def _deform_sample(m: Maker) -> Outputs:
    leaves, grad = _image(m, 8, 2), m.normal(2, 72, 20)
    x, offset, mask = leaves.values()
    out = d.deform_sample(x, offset, 3, padding=1, mask=mask)
    arrays = _n(x), _n(offset), _n(mask)
    yield Output("columns", out, deform_reference.sample(*arrays, _GEOMETRY))
    wanted = deform_reference.sample_grad(*arrays, _GEOMETRY, _n(grad))
    for (what, got), want in zip(_gradients(out, grad, **leaves), wanted, strict=True):
        yield Output(what, got, want, rounded=True)


def _deform_conv2d(m: Maker) -> Outputs:
    leaves, grad = _image(m, 32, 1), m.normal(2, 16, 4, 5)
    weight, bias = m.normal(16, 32, 3, 3).requires_grad_(), m.normal(16).requires_grad_()
    x, offset, mask = leaves.values()
    out = d.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
    arrays = _n(x), _n(offset), _n(mask), _n(weight)
    yield Output("output", out, deform_reference.conv2d(*arrays, _n(bias), _GEOMETRY), rounded=True)
    wanted = deform_reference.conv2d_grad(*arrays, _GEOMETRY, _n(grad))
    found = _gradients(out, grad, **leaves, weight=weight, bias=bias)
    for (what, got), want in zip(found, wanted, strict=True):
        yield Output(what, got, want, rounded=True)


CASES: dict[str, Callable[[Maker], Outputs]] = {
    "sigmoid_focal_loss": _sigmoid_focal_loss,
    "softmax_focal_loss": _softmax_focal_loss,
    "ghmc_loss": _ghmc_loss,
    "ghmr_loss": _ghmr_loss,
    "box_iou": _pairwise("box_iou", "iou"),
    "generalized_box_iou": _pairwise("generalized_box_iou", "giou"),
    "distance_box_iou": _pairwise("distance_box_iou", "diou"),
    "complete_box_iou": _pairwise("complete_box_iou", "ciou"),
    "generalized_box_iou_loss": _elementwise("generalized_box_iou_loss", "giou"),
    "distance_box_iou_loss": _elementwise("distance_box_iou_loss", "diou"),
    "complete_box_iou_loss": _elementwise("complete_box_iou_loss", "ciou"),
    "box_match": _box_match,
    "nms": _nms,
    "batched_nms": _batched_nms,
    "nms_padded": _nms_padded,
    "soft_nms": _soft_nms,
    "soft_nms_padded": _soft_nms_padded,
    "deform_sample": _deform_sample,
    "deform_conv2d": _deform_conv2d,
}
