"""``dlops_triton.compat.mmdet`` and ``.detectron2``: signatures, formulas, conventions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops_triton
from dlops_triton.compat import detectron2, mmdet
from tests.test_compat_torchvision import boxes, plain

LOSS = "pred, target, weight=None, reduction='mean', avg_factor=None, eps=1e-07"
SIGNATURES = {
    "sigmoid_focal_loss": "pred, target, weight=None, gamma=2.0, alpha=0.25, reduction='mean', "
    "avg_factor=None",
    "FocalLoss": "use_sigmoid=True, gamma=2.0, alpha=0.25, reduction='mean', loss_weight=1.0, "
    "activated=False",
    "FocalLoss.forward": "self, pred, target, weight=None, avg_factor=None, "
    "reduction_override=None",
    "GHMC.forward": "self, pred, target, label_weight=None, reduction_override=None, **kwargs",
    "GHMR.forward": "self, pred, target, label_weight=None, avg_factor=None, "
    "reduction_override=None",
    "giou_loss": LOSS,
    "diou_loss": LOSS,
    "GIoULoss": "eps=1e-06, reduction='mean', loss_weight=1.0",
    "DIoULoss": "eps=1e-06, reduction='mean', loss_weight=1.0",
    "GIoULoss.forward": "self, pred, target, weight=None, avg_factor=None, "
    "reduction_override=None, **kwargs",
    "bbox_overlaps": "bboxes1, bboxes2, mode='iou', is_aligned=False, eps=1e-06",
    "MaxIoUAssigner": "pos_iou_thr, neg_iou_thr, min_pos_iou=0.0, gt_max_assign_all=True, "
    "ignore_iof_thr=-1, ignore_wrt_candidates=True, match_low_quality=True, gpu_assign_thr=-1, "
    "iou_calculator=None, perm_repeat_gt_cfg=None",
}
PAIRS = "boxes1, boxes2, reduction='none', eps=1e-07"
DETECTRON2 = {
    "batched_nms": "boxes, scores, idxs, iou_threshold",
    "nms": "boxes, scores, iou_threshold",
    "pairwise_iou": "boxes1, boxes2",
    "sigmoid_focal_loss": "inputs, targets, alpha=-1, gamma=2, reduction='none'",
    "sigmoid_focal_loss_jit": "inputs, targets, alpha=-1, gamma=2, reduction='none'",
    "giou_loss": PAIRS,
    "diou_loss": PAIRS,
    "ciou_loss": PAIRS,
    "deform_conv": "input, offset, weight, stride=1, padding=0, dilation=1, groups=1, "
    "deformable_groups=1, im2col_step=64",
    "modulated_deform_conv": "input, offset, mask, weight, bias=None, stride=1, padding=0, "
    "dilation=1, groups=1, deformable_groups=1",
    "DeformConv": "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, "
    "groups=1, deformable_groups=1, bias=False, norm=None, activation=None",
    "ModulatedDeformConv": "in_channels, out_channels, kernel_size, stride=1, padding=0, "
    "dilation=1, groups=1, deformable_groups=1, bias=True, norm=None, activation=None",
}


def test_signatures() -> None:
    for name, signature in SIGNATURES.items():
        member: Any = mmdet
        for part in name.split("."):
            member = getattr(member, part)
        assert plain(member) == signature, name
    assert {name: plain(getattr(detectron2, name)) for name in detectron2.__all__} == DETECTRON2


# ---- mmdet


def test_focal_loss(device: torch.device) -> None:
    x = torch.randn(12, 4, device=device, requires_grad=True)
    y = torch.arange(12, device=device) % 6 - 1  # -1 and 4 are background
    y[6] = -100  # as well
    dense = torch.nn.functional.one_hot(y.clamp(min=0), 5)[:, :4] * (y >= 0)[:, None]
    each = dlops_triton.sigmoid_focal_loss(x, dense.float()).detach()
    rows, elements = torch.rand(12, device=device), torch.rand(12, 4, device=device)
    for target in (y, dense, dense.float()):
        for weight, factor in (
            (None, each.new_ones(())),
            (rows, rows[:, None]),
            (rows[:, None], rows[:, None]),
            (elements, elements),
            (elements.flatten(), elements),
            (rows > 0.5, (rows > 0.5)[:, None].float()),
        ):
            want = (each * factor).sum()
            loss = mmdet.FocalLoss(loss_weight=2.0)
            torch.testing.assert_close(loss(x, target, weight), 2 * want / 48)
            torch.testing.assert_close(loss(x, target, weight, avg_factor=5), 2 * want / 5)
            five = torch.tensor(5.0, device=device)
            torch.testing.assert_close(loss(x, target, weight, avg_factor=five), 2 * want / 5)
            got = loss(x, target, weight, reduction_override="none", avg_factor=5)
            torch.testing.assert_close(got, 2 * each * factor)
            torch.testing.assert_close(loss(x, target, weight, None, "sum"), 2 * want)
    # No positives: mmdet adds the eps of fp32 to the divisor.
    assert torch.isfinite(mmdet.FocalLoss()(x, y, avg_factor=0))
    with pytest.raises(ValueError, match="avg_factor can not be used with reduction"):
        mmdet.FocalLoss(reduction="sum")(x, y, avg_factor=5)
    with pytest.raises(ValueError, match="use_sigmoid must be True"):
        mmdet.FocalLoss(use_sigmoid=False)
    with pytest.raises(ValueError, match="activated must be False"):
        mmdet.FocalLoss(activated=True)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("grad", [True, False])
def test_focal_loss_compiles(device: torch.device, grad: bool) -> None:
    """Also in validation, where nothing needs a gradient."""
    x = torch.randn(5, 4, device=device, requires_grad=grad)
    y = torch.arange(5, device=device)
    loss = mmdet.FocalLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))


def test_ghm(device: torch.device) -> None:
    x, y = torch.randn(40, 5, device=device), torch.randint(0, 6, (40,), device=device)
    used = (torch.rand(40, device=device) > 0.3).float()
    loss = mmdet.GHMC(bins=10).to(device)
    assert torch.equal(loss(x, y, used, avg_factor=3.0), dlops_triton.ghmc_loss(x, y, used))
    deltas, wanted = torch.randn(40, 4, device=device), torch.zeros(40, 4, device=device)
    weights = used[:, None].expand(40, 4)
    regress = mmdet.GHMR().to(device)
    want = dlops_triton.ghmr_loss(deltas, wanted, weights)
    assert torch.equal(regress(deltas, wanted, weights, avg_factor=7.0), want)
    # What a half-precision prediction is compared with is not rounded.
    far = (deltas * 100).half()
    exact = regress(far.float(), deltas * 100, weights)
    torch.testing.assert_close(regress(far, deltas * 100, weights), exact)
    for reduction in ("none", "sum"):
        want = dlops_triton.ghmc_loss(x, y, used, reduction=reduction)
        assert torch.equal(loss(x, y, used, reduction_override=reduction), want)
        assert torch.equal(mmdet.ghmc_forward(loss, x, y, used, reduction), want)
        want = dlops_triton.ghmr_loss(deltas, wanted, weights, reduction=reduction)
        assert torch.equal(regress(deltas, wanted, weights, 7.0, reduction), want)
    assert list(mmdet.GHMC(momentum=0.75).state_dict()) == ["edges", "acc_sum"]


def test_ghm_of_mmdets_own_modules(device: torch.device) -> None:
    """As ``patch`` has it: any object with the attributes, and counts that were converted."""
    x, y = torch.randn(40, 5, device=device) * 3, torch.randint(0, 6, (40,), device=device)
    used = torch.ones(40, device=device)
    ours = mmdet.GHMC(momentum=0.75).to(device)
    ours(x, y, used)
    theirs = SimpleNamespace(**vars(ours) | {"acc_sum": ours.acc_sum.half(), "training": False})
    ours.eval()
    for _ in range(2):
        got = mmdet.ghmc_forward(theirs, x, y, used)
        torch.testing.assert_close(got, ours(x, y, used), rtol=1e-3, atol=0)
        assert torch.equal(theirs.acc_sum, ours.acc_sum.half().float())
    theirs.training = True
    for _ in range(9):
        mmdet.ghmc_forward(theirs, x, y, used, "none")
    assert theirs.acc_sum.dtype == torch.float32
    assert theirs.acc_sum.sum() > 3 * ours.acc_sum.sum()


@pytest.mark.parametrize("kind", ["giou", "diou"])
def test_box_losses(device: torch.device, kind: str) -> None:
    a, b = boxes(9, device).requires_grad_(), boxes(9, device)
    function = {"giou": mmdet.giou_loss, "diou": mmdet.diou_loss}[kind]
    module = {"giou": mmdet.GIoULoss, "diou": mmdet.DIoULoss}[kind](loss_weight=2.0)
    pairs = dlops_triton.generalized_box_iou if kind == "giou" else dlops_triton.distance_box_iou
    each = 1 - pairs(a, b).diagonal().detach()
    weight = torch.rand(9, device=device)
    for value, factor in ((None, torch.ones_like(weight)), (weight, weight)):
        want = (each * factor).sum()
        torch.testing.assert_close(function(a, b, value), want / 9)
        torch.testing.assert_close(function(a, b, value, avg_factor=5), want / 5)
        torch.testing.assert_close(function(a, b, value, "sum"), want)
        torch.testing.assert_close(function(a, b, value, "none"), each * factor)
        torch.testing.assert_close(module(a, b, value, avg_factor=5), 2 * want / 5)
        assert torch.isfinite(function(a, b, value, avg_factor=0))
        for options in ({}, {"reduction": "sum"}, {"avg_factor": 3.0}):
            of_eps = function(a, b, value, eps=500.0, **options)
            assert not torch.isclose(of_eps, function(a, b, value, **options), rtol=1e-3)
    # What a half-precision prediction is compared with is not rounded.
    far, near = a.detach() + 1000, b + 1000.3
    got = function(far.bfloat16(), near, reduction="none")
    torch.testing.assert_close(got, function(far.bfloat16().float(), near, reduction="none"))
    rough = type(module)(eps=500.0)
    assert torch.equal(rough(a, b), function(a, b, eps=500.0))
    halves = function(a.detach().half(), b.half(), weight.half(), "sum")
    assert halves.dtype == torch.float32
    four = weight[:, None].expand(9, 4)
    torch.testing.assert_close(module(a, b, four), module(a, b, weight))
    module(a, b, weight * 0, avg_factor=torch.zeros((), device=device)).backward()
    assert a.grad is not None
    assert not a.grad.any()
    with pytest.raises(ValueError, match="avg_factor can not be used with reduction"):
        function(a, b, weight, "sum", 5)
    with pytest.raises(ValueError, match="reduction must be one of"):
        function(a, b, weight, "total")


def test_bbox_overlaps(device: torch.device) -> None:
    a, b = boxes(6, device), boxes(5, device)
    assert torch.equal(mmdet.bbox_overlaps(a, b), dlops_triton.box_iou(a, b))
    assert torch.equal(mmdet.bbox_overlaps(a, b, "iof"), dlops_triton.box_iou(a, b, mode="iof"))
    assert torch.equal(mmdet.bbox_overlaps(a, b, "giou"), dlops_triton.generalized_box_iou(a, b))
    for mode in ("iou", "iof", "giou"):
        pairs = mmdet.bbox_overlaps(a[:5], b, mode, is_aligned=True)
        torch.testing.assert_close(pairs, mmdet.bbox_overlaps(a[:5], b, mode).diagonal())
        assert mmdet.bbox_overlaps(a[:0], b, mode).shape == (0, 5)
        assert mmdet.bbox_overlaps(a[:0], b[:0], mode, is_aligned=True).shape == (0,)
        large = torch.tensor([[0.0, 0, 400, 400]], device=device).half()
        assert mmdet.bbox_overlaps(large, large, mode, is_aligned=True) == 1
        assert mmdet.bbox_overlaps(a.expand(2, 6, 4), b.expand(2, 5, 4), mode).shape == (2, 6, 5)
        assert mmdet.bbox_overlaps(a.half(), b.half(), mode).dtype == torch.half
        assert mmdet.bbox_overlaps(a[:5].half(), b.half(), mode, True).dtype == torch.half
        for aligned in (False, True):  # integers
            whole = mmdet.bbox_overlaps(a[:5].long(), b.long(), mode, aligned)
            assert torch.equal(
                whole, mmdet.bbox_overlaps(a[:5].long().float(), b.long().float(), mode, aligned)
            )
    with pytest.raises(ValueError, match="mode must be one of"):
        mmdet.bbox_overlaps(a, b, "diou")
    with pytest.raises(ValueError, match="as many boxes where they are aligned"):
        mmdet.bbox_overlaps(a, b, is_aligned=True)


def by_loop(overlaps: Tensor, pos: float, neg: tuple[float, float], least: float) -> list[int]:
    """The rule of MaxIoUAssigner, anchor by anchor, for [M, N] overlaps."""
    assigned = []
    for column in overlaps.T.tolist():
        best = max(column)
        gt = column.index(best) + 1
        assigned.append(gt if best >= pos else 0 if neg[0] <= best < neg[1] else -1)
    for gt, row in enumerate(overlaps.tolist()):
        if max(row) >= least:
            for i, overlap in enumerate(row):
                if overlap == max(row):
                    assigned[i] = gt + 1
    return assigned


def in_steps(gt: Tensor, priors: Tensor) -> Tensor:
    """[M, N] IoUs, rounded at each step, as mmdet's and the kernel's."""
    a, b = gt[:, None], priors[None]
    sides = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    inter = sides[..., 0] * sides[..., 1]
    return inter / (areas[0] + areas[1] - inter)


@pytest.mark.parametrize("ignore", [None, "candidates", "regions"])
@pytest.mark.parametrize("negative", [0.4, (0.1, 0.4)])
def test_assigner(device: torch.device, ignore: str | None, negative: Any) -> None:
    priors, gt, regions = boxes(80, device), boxes(5, device), boxes(2, device)
    priors[7] = gt[0]
    assigner = mmdet.MaxIoUAssigner(
        0.5,
        negative,
        min_pos_iou=0.2,
        ignore_iof_thr=-1 if ignore is None else 0.5,
        ignore_wrt_candidates=ignore == "candidates",
    )
    overlaps = in_steps(gt, priors)
    if ignore is not None:
        covered = (
            dlops_triton.box_iou(priors, regions, mode="iof").amax(1)
            if ignore == "candidates"
            else dlops_triton.box_iou(regions, priors, mode="iof").amax(0)
        )
        overlaps[:, covered > 0.5] = -1
        assert (covered > 0.5).any()
    labels = torch.arange(5, device=device) * 10
    instances = SimpleNamespace(bboxes=SimpleNamespace(tensor=gt), labels=labels)
    found = assigner.assign(
        SimpleNamespace(priors=priors), instances, SimpleNamespace(bboxes=regions)
    )
    low, high = negative if isinstance(negative, tuple) else (0, negative)
    want = by_loop(overlaps, 0.5, (low, high), 0.2)
    assert {-1, 0} < set(want)
    assert found.gt_inds.tolist() == want
    assert torch.equal(found.max_overlaps, overlaps.amax(0))
    assert found.labels.tolist() == [-1 if i <= 0 else 10 * (i - 1) for i in want]
    assert found.num_gts == 5
    with_score = SimpleNamespace(priors=torch.cat([priors, priors[:, :1]], 1))
    five = SimpleNamespace(bboxes=torch.cat([gt, gt[:, :1]], 1), labels=labels)
    again = assigner.assign(with_score, five, SimpleNamespace(bboxes=regions))
    assert torch.equal(again.gt_inds, found.gt_inds)
    nothing = SimpleNamespace(bboxes=gt[:0], labels=labels[:0])
    found = assigner.assign(SimpleNamespace(priors=priors), nothing)
    assert not found.gt_inds.any()
    assert not found.max_overlaps.any()
    assert (found.labels == -1).all()


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("least", [0.01, 0.3])
def test_assigner_gives_boxes_their_best(
    device: torch.device, low_quality: bool, least: float
) -> None:
    """Also below the lower of two thresholds of background."""
    gt = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]], device=device)
    shift = torch.tensor([[8.0], [5], [0]], device=device)  # IoUs of 1 / 9, 1 / 3 and 1
    priors = gt + shift * torch.tensor([1.0, 0, 1, 0], device=device)
    assigner = mmdet.MaxIoUAssigner(0.5, (0.2, 0.4), least, match_low_quality=low_quality)
    instances = SimpleNamespace(bboxes=gt, labels=torch.arange(3, device=device))
    found = assigner.assign(SimpleNamespace(priors=priors), instances)
    want = [1 if least < 0.1 else -1, 2, 3] if low_quality else [-1, 0, 3]
    assert found.gt_inds.tolist() == want
    # An IoF of the threshold is not ignored; overlaps have the boxes' dtype.
    assigner.ignore_iof_thr = 0.5
    half = SimpleNamespace(bboxes=priors[2:] + torch.tensor([5.0, 0, 5, 0], device=device))
    found = assigner.assign(SimpleNamespace(priors=priors), instances, half)
    assert found.gt_inds.tolist() == want
    instances.bboxes = gt.half()
    found = assigner.assign(SimpleNamespace(priors=priors.half()), instances)
    assert found.max_overlaps.dtype == torch.half


def test_assigner_says_what_it_does_not_cover() -> None:
    for argument, value in (
        ("gt_max_assign_all", False),
        ("iou_calculator", {"type": "BboxOverlaps2D", "scale": 2.0}),
        ("perm_repeat_gt_cfg", {"iou_thr": 0.7}),
    ):
        with pytest.raises(ValueError, match=f"{argument} must be"):
            mmdet.MaxIoUAssigner(0.5, 0.4, **{argument: value})  # type: ignore[arg-type]


# ---- detectron2


def test_detectron2_boxes(device: torch.device) -> None:
    a, scores = boxes(30, device), torch.rand(30, device=device)
    idxs = torch.arange(30, device=device) % 2
    got = detectron2.batched_nms(a.half(), scores, idxs, 0.3)
    assert torch.equal(got, dlops_triton.batched_nms(a.half().float(), scores, idxs, 0.3))
    whole = detectron2.batched_nms(a.long(), scores, idxs, 0.3)
    assert torch.equal(whole, dlops_triton.batched_nms(a.long().float(), scores, idxs, 0.3))
    one, two = SimpleNamespace(tensor=a), SimpleNamespace(tensor=a[:4])
    assert torch.equal(detectron2.pairwise_iou(one, two), dlops_triton.box_iou(a, a[:4]))
    point = SimpleNamespace(tensor=torch.full((1, 4), 3.0, device=device))
    assert detectron2.pairwise_iou(point, point).item() == 0


def test_detectron2_losses(device: torch.device) -> None:
    x, t = torch.randn(6, 3, device=device), torch.rand(6, 3, device=device)
    want = dlops_triton.sigmoid_focal_loss(x, t, alpha=None, reduction="sum")
    torch.testing.assert_close(detectron2.sigmoid_focal_loss(x, t, reduction="sum"), want)
    assert detectron2.sigmoid_focal_loss_jit(x.half(), t.half()).dtype == torch.float32
    assert detectron2.sigmoid_focal_loss(x, t.double()).dtype == torch.float32
    a, b = boxes(6, device), boxes(6, device)
    for function, native in (
        (detectron2.giou_loss, dlops_triton.generalized_box_iou_loss),
        (detectron2.diou_loss, dlops_triton.distance_box_iou_loss),
        (detectron2.ciou_loss, dlops_triton.complete_box_iou_loss),
    ):
        assert torch.equal(function(a, b, "mean"), native(a, b, "mean"))
        assert function(a[0], b[0]).shape == ()


def test_detectron2_deform(device: torch.device) -> None:
    x = torch.rand(2, 4, 6, 6, device=device)
    offset, mask = torch.randn(2, 18, 6, 6, device=device), torch.rand(2, 9, 6, 6, device=device)
    norm = torch.nn.BatchNorm2d(6)
    first = detectron2.DeformConv(4, 6, 3, padding=1, groups=2, norm=norm, activation=torch.relu)
    first = first.to(device)
    assert first.weight.std() > 0.1  # uniform within sqrt(6 / 18)
    plain_out = dlops_triton.deform_conv2d(x, offset, first.weight, padding=1)
    torch.testing.assert_close(first(x, offset), torch.relu(first.norm(plain_out)))
    second = detectron2.ModulatedDeformConv(4, 6, 3, padding=1).to(device)
    want = dlops_triton.deform_conv2d(x, offset, second.weight, second.bias, padding=1, mask=mask)
    assert torch.equal(second(x, offset, mask), want)
    assert second(x[:0], offset[:0], mask[:0]).shape == (0, 6, 6, 6)
    assert set(second.state_dict()) == {"weight", "bias"}
    with pytest.raises(ValueError, match="bias must be False"):
        detectron2.DeformConv(4, 6, 3, bias=True)
    with pytest.raises(ValueError, match="must be multiples of groups, 4"):
        detectron2.DeformConv(4, 6, 3, groups=4)
