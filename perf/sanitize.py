"""One small call of every kernel, for compute-sanitizer: ``python -m dlops_triton.perf.sanitize``.

Sizes are ragged, so that the last block of every kernel has lanes outside the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlops_triton import (
    _ghm_table,
    batched_nms,
    box_iou,
    box_match,
    complete_box_iou,
    complete_box_iou_loss,
    deform_conv2d,
    deform_sample,
    ghmc_loss,
    ghmr_loss,
    nms,
    nms_padded,
    sigmoid_focal_loss,
    soft_nms,
    soft_nms_padded,
    softmax_focal_loss,
)

from .bench import load

DONE = "every call came back"


def calls(device: torch.device) -> None:
    """Call every op forward and, where it has a gradient, backward."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, generator=g).to(device, dtype)

    def boxes(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        corner = random(*shape, 2) * 100
        return torch.cat([corner, corner + random(*shape, 2) * 30], dim=-1).to(dtype)

    labels = torch.randint(0, 84, (131,), generator=g).to(device)
    for dtype, targets, weight in (
        (torch.bfloat16, labels, random(131)),
        (torch.float32, random(131, 83), random(131, 83)),
    ):
        x = random(131, 83, dtype=dtype).requires_grad_()
        sigmoid_focal_loss(x, targets, reduction="sum", weight=weight).backward()
        loss = sigmoid_focal_loss(x, targets, weight=weight)
        loss.backward(random(*loss.shape, dtype=dtype))

    head = random(2, 83, 131, dtype=torch.bfloat16).requires_grad_()
    rows = random(131, 83, dtype=torch.bfloat16).requires_grad_()
    sigmoid_focal_loss([rows, head.mT], [labels, labels.expand(2, 131)], reduction="sum").mul(
        2
    ).backward()

    for shape in ((131, 83), (3, 83, 47), (3, 5003), (2, 301, 35)):
        x = random(*shape, dtype=torch.bfloat16).requires_grad_()
        each = torch.randint(-1, shape[1] + 1, shape[:1] + shape[2:], generator=g).to(device)
        softmax_focal_loss(x, each, label_smoothing=0.1, weight=random(shape[1])).backward()
        loss = softmax_focal_loss(x, each, reduction="none")
        loss.backward(random(*loss.shape, dtype=torch.bfloat16))

    for targets in (labels, random(131, 83)):
        x = random(131, 83).requires_grad_()
        acc_sum = torch.zeros(30, device=device)
        ghmc_loss(x, targets, random(131), bins=30, momentum=0.7, acc_sum=acc_sum).mul(2).backward()
        ghmc_loss(x, targets, reduction="none").backward(random(131, 83))
    ghmr_loss(x, random(131, 83), random(131, 83)).backward()
    # What a process group launches between its all-reduce and the loss.
    totals = _ghm_table.totals_of(x, targets, None, None, 30)
    _ghm_table.averaged_table_from(totals, acc_sum, None, None, 30, 0.7, True, False)

    for dtype in (torch.bfloat16, torch.float32):
        a = boxes(2, 133, dtype=dtype).requires_grad_()
        b = boxes(2, 71, dtype=dtype).requires_grad_()
        iou = box_iou(a, b)
        iou.backward(random(*iou.shape, dtype=dtype))
        ciou = complete_box_iou(a, b)
        ciou.backward(random(*ciou.shape, dtype=dtype))
        near = a.detach().roll(1, 1).requires_grad_()
        each = complete_box_iou_loss(a, near)
        each.backward(random(*each.shape, dtype=dtype))
        complete_box_iou_loss(a, near, "mean").backward()
        box_match(a, b, gt_valid=random(2, 71) > 0.1)

    n = 2501  # boxes, which are several bands of a shrunk NMS
    classes = torch.randint(0, 3, (n,), generator=g).to(device)
    with load("nms").shrunk():
        nms(boxes(n), random(n), 0.5, score_threshold=0.1)
        nms(boxes(701), random(701), 0.5)
        batched_nms(boxes(n, dtype=torch.float16), random(n), classes, 0.5)
        nms_padded(
            boxes(2, 133), random(2, 133), 0.5, idxs=classes[:266].view(2, 133), max_output=9
        )
    soft_nms(boxes(n), random(n), max_output=50)
    soft_nms_padded(boxes(2, 133), random(2, 133), idxs=classes[:266].view(2, 133), max_output=9)

    shapes = (2, 54, 7, 11), (2, 27, 7, 11)
    torch.use_deterministic_algorithms(False)  # additions by atomics
    for dtype, columns in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        # Two groups of weights and three of offsets, some of which lead outside.
        x, weight = (random(*shape, dtype=dtype) for shape in ((2, 36, 7, 11), (22, 18, 3, 3)))
        offset, mask = (9 * random(*shape) - 4 for shape in shapes)
        leaves = [t.requires_grad_() for t in (x, offset, weight, mask)]
        out = deform_conv2d(
            x,
            offset,
            weight,
            padding=1,
            mask=mask,
            _implementation="columns" if columns else "fused",
        )
        torch.autograd.grad(out, leaves, random(*out.shape, dtype=dtype))
    sampled = deform_sample(x, offset, 3, padding=1)
    torch.use_deterministic_algorithms(True)  # gathers
    torch.autograd.grad(sampled, (x, offset), random(*sampled.shape))
    torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    calls(torch.device("cuda"))
    torch.cuda.synchronize()
    print(DONE)
