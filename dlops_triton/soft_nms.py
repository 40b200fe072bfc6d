"""Soft non-maximum suppression: the public functions and their launcher."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import _checks, _dispatch, _vmap
from ._settings import Settings
from .kernels.soft_nms import soft_nms_kernel
from .reference import soft_nms as reference

Method = Literal["gaussian", "linear", "hard"]

# A program has up to SIZE boxes in registers; CHUNK is how many it looks through for segments.
SOFT = Settings(
    "soft_nms",
    fp32={"SIZE": 1024, "CHUNK": 32, "num_warps": 8},
    fp64={"SIZE": 512, "CHUNK": 32, "num_warps": 8},
)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: Method = "gaussian",
    *,
    idxs: Tensor | None = None,
    offset: Literal[0, 1] = 0,
    max_output: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Soft-NMS (Bodla et al., 2017): overlapped boxes are not dropped, their scores decay.

    Repeat: take the box of the highest current score, the first of equals, and decay the scores of
    the rest by their IoU with it,

    .. math::
        s_i \leftarrow s_i \, e^{-\mathrm{IoU}_i^2 / \sigma} \quad (\text{gaussian}), \qquad
        s_i \leftarrow s_i (1 - \mathrm{IoU}_i) \ (\text{linear}) \ \text{ or } \ 0 \ (\text{hard})
        \ \text{ where } \mathrm{IoU}_i > t .

    Args:
        boxes: [N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64, any strides.
        scores: [N], floating point, such as probabilities.
        iou_threshold: t, in [0, 1], rounded to fp32; "gaussian" does not use it.
        sigma: above 0; only "gaussian" uses it.
        score_threshold: at least 0, rounded to fp32. A box is taken while its current score is
            strictly greater.
        method: "gaussian", "linear" or "hard". "hard" is :func:`nms`.
        idxs: [N] class of each box, int32 or int64, any values: a box only decays scores of its
            own class.
        offset: 1 adds 1 to every width and height (inclusive pixel coordinates).
        max_output: at most so many boxes are returned, the best ones.

    Returns:
        indices: int64 [K], in the order in which the boxes were taken, all classes together: by
            descending decayed score, equal scores in order of index.
        scores: [K] decayed scores in the dtype of ``scores``, computed in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, named
            in the message with its value.

    It is the sequential definition, not an approximation: each score is the product of its factors
    in order. Where the IoU is NaN (NaN or infinite coordinates, two boxes without area) it counts
    as 0. A NaN score takes no part, an infinite one counts as the largest number. The inputs are
    not modified and get no gradient. Bitwise deterministic. The host waits once, for K;
    :func:`soft_nms_padded` never waits.
    """
    _checks.boxes("boxes", boxes)
    _checks.detections(boxes, scores, idxs)
    options = _options(iou_threshold, sigma, score_threshold, method, offset)
    if max_output is not None:
        _checks.integer("max_output", max_output, 0, 2**63 - 1, "None or an integer of at least 0")
    result: tuple[Tensor, Tensor] = _op(boxes.detach(), scores.detach(), idxs, *options, max_output)
    return result


def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: Method = "gaussian",
    *,
    idxs: Tensor | None = None,
    valid: Tensor | None = None,
    offset: Literal[0, 1] = 0,
    max_output: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`soft_nms` of several images at once, in a fixed amount of memory.

    Nothing waits for the GPU and no shape depends on data, so it can be captured in a CUDA graph,
    compiled with fullgraph, exported and vmapped.

    Args:
        boxes: [B, N, 4] boxes (x1, y1, x2, y2), fp16, bf16, fp32 or fp64, any strides.
        scores: [B, N], floating point.
        iou_threshold, sigma, score_threshold, method, offset: as in :func:`soft_nms`.
        idxs: [B, N] class of each box, int32 or int64, any values.
        valid: [B] int32 or int64: only the first so many boxes of an image take part. Below 0 it
            counts as 0, above N as N.
        max_output: room for so many boxes per image, all classes together.

    Returns:
        indices: int64 [B, max_output], of boxes of the image, as of :func:`soft_nms`; then -1.
        scores: [B, max_output], decayed; then -1.
        counts: int32 [B], how many they are.

    Raises:
        TypeError, ValueError: as :func:`soft_nms` does.

    Bitwise deterministic, no host synchronisation.
    """
    _checks.images("boxes", boxes)
    _checks.detections(boxes, scores, idxs, valid)
    options = _options(iou_threshold, sigma, score_threshold, method, offset)
    _checks.integer("max_output", max_output, 0, 2**31 - 1, "an integer in [0, 2**31)")
    padded: tuple[Tensor, Tensor, Tensor] = _padded_op(
        boxes.detach(), scores.detach(), idxs, valid, *options, max_output
    )
    return padded


def _options(
    iou_threshold: float, sigma: float, score_threshold: float, method: str, offset: int
) -> tuple[float, float, float, str, int]:
    _checks.number("iou_threshold", iou_threshold, 0, 1, "in [0, 1]")
    _checks.number("sigma", sigma, 2**-100, float("inf"), "above 0 and finite")
    _checks.number("score_threshold", score_threshold, 0, float("inf"), "at least 0 and finite")
    _checks.choice("method", method, ("gaussian", "linear", "hard"))
    _checks.choice("offset", offset, (0, 1))
    return float(iou_threshold), float(sigma), float(score_threshold), method, int(offset)


@torch.no_grad()  # the graph of torch.export has no detach
def _run(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    valid: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N] indices and decayed scores, best first, -1 where not selected; [B] how many were."""
    iou_threshold, sigma, score_threshold, method, offset, max_output = options
    images, n = scores.shape
    settings = dict(SOFT.on(boxes))
    size = min(settings["SIZE"], max(32, _dispatch.next_power_of_2(n)))
    lowest = float(np.float32(np.clip(score_threshold, 0, np.finfo(np.float32).max)))
    # What torch makes of it keeps its layout, on which the kernel relies.
    state = scores.to(_dispatch.compute_dtype(scores.dtype)).contiguous()
    state = state.clamp(max=torch.finfo(state.dtype).max)  # infinity times 0 would be NaN
    takes_part = state > lowest
    if valid is not None:
        takes_part = takes_part & (torch.arange(n, device=boxes.device) < valid[:, None])
    state = torch.where(takes_part, state, 0.0)
    ids = order = None
    programs = images
    if idxs is not None:
        ids, order = torch.sort(idxs.contiguous(), stable=True)
        order = order.int()
        programs = images * _dispatch.cdiv(n, settings["CHUNK"])
    _dispatch.launch(
        soft_nms_kernel,
        (programs,),
        boxes.contiguous(),
        state,
        ids,
        order,
        boxes.new_empty((images, n), dtype=torch.int32) if n > size else None,
        n,
        min(max_output, n),
        float(np.float32(iou_threshold)),
        lowest,
        METHOD=method,
        SIGMA=sigma,
        OFFSET=offset,
        enable_fp_fusion=False,
        **settings | {"SIZE": size},
    )
    selected = torch.where(state < 0, -state, -1.0)
    decayed, indices = torch.sort(selected, descending=True, stable=True)
    return indices, decayed, (state < 0).sum(1, dtype=torch.int32)


def _launch(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    n, max_output = len(scores), options[-1]
    if n == 0:
        return boxes.new_empty(0, dtype=torch.int64), scores.new_empty(0)
    most = n if max_output is None else min(max_output, n)
    ids = None if idxs is None else idxs[None]
    indices, decayed, counts = _run(boxes[None], scores[None], ids, None, *options[:-1], most)
    count = min(counts.item(), most)
    return indices[0, :count], decayed[0, :count].to(scores.dtype)


def _launch_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, valid: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, max_output = scores.shape[1], options[-1]
    padded = _alloc_padded(boxes, scores, idxs, valid, *options)
    indices, emitted, counts = padded[0].fill_(-1), padded[1].fill_(-1), padded[2].zero_()
    if scores.numel() > 0 and max_output > 0:
        found, decayed, count = _run(boxes, scores, idxs, valid, *options)
        width = min(n, max_output)
        decayed = decayed[:, :width]
        indices[:, :width] = torch.where(decayed > 0, found[:, :width], -1)
        emitted[:, :width] = decayed
        counts.copy_(count.clamp(max=max_output))
    return indices, emitted, counts


def _alloc_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, valid: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (boxes.shape[0], options[-1])
    return (
        boxes.new_empty(shape, dtype=torch.int64),
        scores.new_empty(shape),
        boxes.new_empty(shape[:1], dtype=torch.int32),
    )


def _numpy(t: Tensor | None) -> Any:
    return None if t is None else _dispatch.to_numpy(t)


def _reference(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    *options, offset, max_output = options  # type: ignore[assignment]
    indices, decayed = reference.soft_nms(
        _numpy(boxes),
        _numpy(scores),
        *options,
        idxs=_numpy(idxs),
        offset=offset,
        max_output=max_output,
    )
    return (
        _dispatch.from_numpy(indices, torch.int64),
        _dispatch.from_numpy(decayed, scores.dtype),
    )


def _reference_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, valid: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, offset, max_output = options  # type: ignore[assignment]
    indices, decayed, counts = reference.soft_nms_padded(
        _numpy(boxes),
        _numpy(scores),
        *options,
        idxs=_numpy(idxs),
        valid=_numpy(valid),
        offset=offset,
        max_output=max_output,
    )
    return (
        _dispatch.from_numpy(indices, torch.int64),
        _dispatch.from_numpy(decayed, scores.dtype),
        _dispatch.from_numpy(counts, torch.int32),
    )


def _fake(boxes: Tensor, scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(size, dtype=torch.int64), scores.new_empty(size)


_op = _dispatch.register(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, float sigma, "
    "float score_threshold, str method, int offset, SymInt? max_output) -> (Tensor, Tensor)",
    _launch,
    _reference,
    _fake,
    vmap=_vmap.refused(
        "torch.vmap does not take soft_nms, the size of whose result depends on data: "
        "soft_nms_padded has a fixed size, and takes a batch of images"
    ),
)
_padded_op = _dispatch.register(
    "soft_nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, Tensor? valid, "
    "float iou_threshold, float sigma, float score_threshold, str method, int offset, "
    "SymInt max_output) -> (Tensor, Tensor, Tensor)",
    _launch_padded,
    _reference_padded,
    _alloc_padded,
    vmap=_vmap.merged(4),
)
