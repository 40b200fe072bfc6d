"""``dlops_triton.compat.mmcv``: the numbers that mmcv's own tests expect, and its conventions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dlops_triton
from dlops_triton.compat import mmcv
from tests.test_compat_torchvision import boxes, plain

SIGNATURES = {
    "nms": "boxes, scores, iou_threshold, offset=0, score_threshold=0, max_num=-1",
    "soft_nms": "boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=0.001, method='linear', "
    "offset=0",
    "batched_nms": "boxes, scores, idxs, nms_cfg, class_agnostic=False",
    "bbox_overlaps": "bboxes1, bboxes2, mode='iou', aligned=False, offset=0",
    "sigmoid_focal_loss": "input, target, gamma=2.0, alpha=0.25, weight=None, reduction='mean'",
    "softmax_focal_loss": "input, target, gamma=2.0, alpha=0.25, weight=None, reduction='mean'",
    "SigmoidFocalLoss": "gamma, alpha, weight=None, reduction='mean'",
    "SoftmaxFocalLoss": "gamma, alpha, weight=None, reduction='mean'",
    "deform_conv2d": "input, offset, weight, stride=1, padding=0, dilation=1, groups=1, "
    "deform_groups=1, bias=False, im2col_step=32",
    "modulated_deform_conv2d": "input, offset, mask, weight, bias=None, stride=1, padding=0, "
    "dilation=1, groups=1, deform_groups=1",
    "DeformConv2d": "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, "
    "groups=1, deform_groups=1, bias=False, im2col_step=32",
    "DeformConv2dPack": "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, "
    "groups=1, deform_groups=1, bias=False, im2col_step=32",
    "ModulatedDeformConv2d": "in_channels, out_channels, kernel_size, stride=1, padding=0, "
    "dilation=1, groups=1, deform_groups=1, bias=True",
    "ModulatedDeformConv2dPack": "in_channels, out_channels, kernel_size, stride=1, padding=0, "
    "dilation=1, groups=1, deform_groups=1, bias=True",
}

BOXES = [[6.0, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]]
SCORES = [0.6, 0.9, 0.7, 0.2]
# Of mmcv's tests, iou_threshold 0.3, sigma 0.5, min_score 0.01: indices and scores.
SOFT = {
    "linear": ([1, 0, 2, 3], [0.9, 0.6, 0.29024392, 0.2]),
    "gaussian": ([1, 0, 2, 3], [0.9, 0.59630775, 0.35275510, 0.18650459]),
    "naive": ([1, 0, 3], [0.9, 0.6, 0.2]),
}
# Logits and labels; loss and gradient by softmax and by sigmoid, gamma 2, alpha 0.25, mean.
FOCAL: list[tuple[Any, ...]] = [
    (
        [[1.0, 0], [0, 1]],
        [0, 1],
        (0.00566451, [[-0.00657264, 0.00657264], [0.00657264, -0.00657264]]),
        (0.13562961, [[-0.00657264, 0.11185755], [0.11185755, -0.00657264]]),
    ),
    (
        [[1.0, 0, -1], [0, 1, 2]],
        [2, 1],
        (
            0.34956908,
            [[0.10165970, 0.03739851, -0.13905823], [0.01227554, -0.10298023, 0.09070466]],
        ),
        (
            1.10251057,
            [[0.28808805, 0.11185755, -0.09602935], [0.11185755, -0.00657264, 0.40376765]],
        ),
    ),
    (
        [[1e-6, 2e-6, 3e-6], [4e-6, 5e-5, 6e-4], [7e-3, 8e-2, 9e-1]],
        [1, 2, 0],
        (
            0.15754992,
            [
                [0.02590877, -0.05181759, 0.02590882],
                [0.02589641, 0.02589760, -0.05179400],
                [-0.07307514, 0.02234372, 0.05073142],
            ],
        ),
        (
            0.42287254,
            [
                [0.07457182, -0.02485716, 0.07457201],
                [0.07457211, 0.07457669, -0.02483728],
                [-0.02462499, 0.08277918, 0.18050370],
            ],
        ),
    ),
]


def close(got: Tensor, want: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(
        got.detach().double().cpu(), torch.tensor(want).double(), rtol=rtol, atol=atol
    )


def test_signatures() -> None:
    assert {name: plain(getattr(mmcv, name)) for name in mmcv.__all__} == SIGNATURES


# ---- what mmcv's own tests expect


def test_nms(device: torch.device) -> None:
    a, scores = torch.tensor(BOXES, device=device), torch.tensor(SCORES, device=device)
    dets, inds = mmcv.nms(a, scores, iou_threshold=0.3, offset=0)
    assert inds.tolist() == [1, 0, 3]
    assert torch.equal(dets, torch.cat([a, scores[:, None]], 1)[[1, 0, 3]])
    as_array = mmcv.nms(np.array(BOXES, np.float32), np.array(SCORES, np.float32), 0.3)
    assert all(isinstance(x, np.ndarray) for x in as_array)
    assert np.array_equal(as_array[0], dets.cpu().numpy())


@pytest.mark.parametrize("method", SOFT)
def test_soft_nms(device: torch.device, method: str) -> None:
    a, scores = torch.tensor(BOXES, device=device), torch.tensor(SCORES, device=device)
    dets, inds = mmcv.soft_nms(a, scores, 0.3, 0.5, 0.01, method)
    assert inds.tolist() == SOFT[method][0]
    close(dets[:, 4], SOFT[method][1], 1e-6)
    assert torch.equal(dets[:, :4], a[inds])


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.half, 1e-2)]
)
def test_focal_losses(device: torch.device, dtype: torch.dtype, rtol: float) -> None:
    """mmcv's tests allow 1e-2."""
    for logits, labels, softmax, sigmoid in FOCAL:
        for loss_of, module, (loss, gradient) in (
            (mmcv.softmax_focal_loss, mmcv.SoftmaxFocalLoss, softmax),
            (mmcv.sigmoid_focal_loss, mmcv.SigmoidFocalLoss, sigmoid),
        ):
            x = torch.tensor(logits, device=device, dtype=dtype, requires_grad=True)
            y = torch.tensor(labels, device=device)
            got = loss_of(x, y, 2.0, 0.25, None, "mean")
            got.backward()
            assert x.grad is not None
            close(got, loss, rtol, 2e-7)
            close(x.grad, gradient, rtol, 5e-7)
            assert torch.equal(module(2.0, 0.25)(x, y), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.half])
def test_bbox_overlaps(device: torch.device, dtype: torch.dtype) -> None:
    def of(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, device=device, dtype=dtype)

    a = of([[1, 1, 3, 4], [2, 2, 3, 4], [7, 7, 8, 8]])
    b = of([[0, 2, 2, 5], [2, 1, 3, 3]])
    rtol = 1e-3 if dtype == torch.half else 1e-6
    close(mmcv.bbox_overlaps(a, b, offset=1), [[1 / 3, 0.5], [0.2, 0.5], [0, 0]], rtol)
    close(mmcv.bbox_overlaps(a[:2], b, aligned=True, offset=1), [1 / 3, 0.5], rtol)
    b = of([[4, 0, 5, 3], [3, 0, 4, 3], [2, 0, 3, 3], [1, 0, 2, 3]])
    close(mmcv.bbox_overlaps(of([[0, 0, 3, 3]]), b, offset=1), [[0, 0.2, 0.5, 0.5]], rtol)
    empty = torch.tensor([], device=device)
    assert mmcv.bbox_overlaps(empty, b).shape == (0, 4)
    assert mmcv.bbox_overlaps(b, empty).shape == (4, 0)
    assert mmcv.bbox_overlaps(empty, empty, aligned=True).shape == (0,)
    with pytest.raises(ValueError, match="aligned boxes must be of one number, got 4 and 1"):
        mmcv.bbox_overlaps(b, b[:1], aligned=True)
    point = of([[2, 2, 2, 2]])
    for aligned in (False, True):
        assert mmcv.bbox_overlaps(point, point, aligned=aligned).sum() == 0
        assert mmcv.bbox_overlaps(b, b, "iof", aligned).dtype == dtype
        with pytest.raises(
            TypeError, match=r"boxes1 must have one of the dtypes .* got torch\.int64"
        ):
            mmcv.bbox_overlaps(b.long(), b.long(), aligned=aligned)
        with pytest.raises(ValueError, match=r"offset must be one of 0, 1, got 0\.5"):
            mmcv.bbox_overlaps(b, b, aligned=aligned, offset=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_deform_conv_pack(device: torch.device, dtype: torch.dtype, tol: float) -> None:
    n = 4  # the batch repeats one image; gradients by parameters are sums over it
    image = [[[1.0, 2, 3], [0, 1, 2], [3, 5, 2]]]
    x = torch.tensor([image] * n, device=device, dtype=dtype, requires_grad=True)
    model = mmcv.DeformConv2dPack(1, 1, 2, stride=1, padding=0, im2col_step=3)
    offset_weight = [
        *([0.1, 0.4, 0.6, 0.1], [0.3, 0.2, 0.1, 0.3], [0.5, 0.5, 0.2, 0.8], [0.8, 0.3, 0.9, 0.1]),
        *([0.3, 0.1, 0.2, 0.5], [0.3, 0.7, 0.5, 0.3], [0.6, 0.2, 0.5, 0.3], [0.4, 0.1, 0.8, 0.4]),
    ]
    with torch.no_grad():
        model.conv_offset.weight.copy_(torch.tensor(offset_weight).view(8, 1, 2, 2))
        assert model.conv_offset.bias is not None
        model.conv_offset.bias.copy_(torch.tensor([0.7, 0.1, 0.8, 0.5, 0.6, 0.5, 0.4, 0.7]))
        model.weight.copy_(torch.tensor([0.4, 0.2, 0.1, 0.9]).view(1, 1, 2, 2))
    model = model.to(device=device, dtype=dtype)
    out = model(x)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert model.weight.grad is not None
    assert model.conv_offset.weight.grad is not None
    close(out, [[[[1.65, 0], [0, 0]]]] * n, tol, 1e-6)
    gradient = [[-0.666, 0.204, 0], [0.030, -0.416, 0.012], [0, 0.252, 0.129]]
    close(x.grad, [[gradient]] * n, tol, 1e-6)
    close(model.weight.grad / n, [[[[3.62, 0], [0.40, 0.18]]]], tol, 1e-6)
    scale = [1.44, -0.72, 0, 0, -0.10, -0.08, -0.54, -0.54]
    by_offset = [[[[s, 2 * s], [0, s]]] for s in scale]
    close(model.conv_offset.weight.grad / n, by_offset, tol, 1e-6)
    close(model.conv_offset.bias.grad / n, scale, tol, 1e-6)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.half])
def test_modulated_deform_conv_pack(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.tensor([[[[1.0, 2, 3]] * 3]], device=device, dtype=dtype, requires_grad=True)
    model = mmcv.ModulatedDeformConv2dPack(
        1, 1, kernel_size=(2, 2), stride=1, padding=1, deform_groups=1, bias=False
    )
    torch.nn.init.ones_(model.weight)
    model = model.to(device=device, dtype=dtype)
    out = model(x)
    out.sum().backward()
    edge, row = [0.5, 1.5, 2.5, 1.5], [1.0, 3, 5, 3]
    tol = 2e-3 if dtype == torch.half else 1e-6
    assert x.grad is not None
    assert model.weight.grad is not None
    assert model.conv_offset.weight.grad is not None
    close(out, [[[edge, row, row, edge]]], tol, tol)
    close(x.grad, [[[[2.0] * 3] * 3]], tol, tol)
    close(model.weight.grad, [[[[9.0, 9], [9, 9]]]], tol, tol)
    by_offset = [
        *([-7.0, -4, 0, 0], [-9, 7.5, -6, 5], [-4, -7, 0, 0], [-7.5, -9, -5, -6]),
        *([-7, -4, -7, -4], [-6, 5, -9, 7.5], [-4, -7, -4, -7], [-5, -6, -7.5, -9]),
        *([10.5, 6, 7, 4], [6, 10.5, 4, 7], [7, 4, 10.5, 6], [4, 7, 6, 10.5]),
    ]
    close(model.conv_offset.weight.grad.view(12, 4), by_offset, tol, tol)
    bias = [-3, -1.5] * 4 + [4.5] * 4
    close(model.conv_offset.bias.grad, bias, tol, tol)  # type: ignore[arg-type]


# ---- conventions


def sequential(
    a: Tensor, scores: Tensor, threshold: float, sigma: float, low: float, method: str
) -> tuple[list[int], list[float]]:
    """mmcv's Soft-NMS: >=, and every box but the first is dropped once it is below ``low``."""
    iou = dlops_triton.box_iou(a.double(), a.double()).float().tolist()
    left = dict(enumerate(scores.tolist()))
    inds, found = [], []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        inds.append(best)
        found.append(left.pop(best))
        for i in list(left):
            overlap = iou[best][i]
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[i] *= 1 - overlap if method == "linear" else 0
            if left[i] < low:
                del left[i]
    return inds, found


@pytest.mark.parametrize("method", ["linear", "gaussian", "naive"])
def test_soft_nms_is_mmcvs_loop(device: torch.device, method: str) -> None:
    grid = boxes(24, device, 8).round() * 4  # IoUs of 0.25, 0.5, 1
    grid[::3] = grid[0]
    grid[1::6] = grid[0] + torch.tensor([0.0, 0, 0, 4], device=device)
    scores = torch.rand(24, device=device)
    threshold = dlops_triton.box_iou(grid[:1], grid[1:2]).item()
    for low in (0.2, 0.001, 2.0):
        inds, found = sequential(grid, scores, threshold, 0.5, low, method)
        dets, got = mmcv.soft_nms(grid, scores, threshold, 0.5, low, method)
        assert got.tolist() == inds
        close(dets[:, 4], found, 1e-5, 1e-7)
    assert len(inds) == 1  # the first box is not compared with min_score
    with pytest.raises(ValueError, match="method must be one of 'naive', 'linear', 'gaussian'"):
        mmcv.soft_nms(grid, scores, method="hard")
    with pytest.raises(ValueError, match=r"min_score must be at least 0 and finite, got -1\.0"):
        mmcv.soft_nms(grid, scores, min_score=-1.0)
    with pytest.raises(ValueError, match=r"iou_threshold must be in \[0, 1\], got 2"):
        mmcv.soft_nms(grid, scores, 2)


def test_a_score_of_exactly_min_score_stays() -> None:
    apart = torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]])
    scores = torch.tensor([0.9, 0.3, 0.3 - 2**-25])
    assert mmcv.soft_nms(apart, scores, min_score=0.3)[1].tolist() == [0, 1]


def test_nms_options(device: torch.device) -> None:
    a, scores = boxes(40, device), torch.rand(40, device=device)
    inds = mmcv.nms(a, scores, 0.3, 1, 0.2, 5)[1]
    want = dlops_triton.nms(a, scores, 0.3, offset=1, score_threshold=0.2, max_output=5)
    assert torch.equal(inds, want)
    assert torch.equal(mmcv.nms(a, -scores, 0.3)[1], dlops_triton.nms(a, -scores, 0.3))
    with pytest.warns(DeprecationWarning, match="iou_thr is called iou_threshold now"):
        assert torch.equal(mmcv.nms(a, scores, iou_thr=0.3)[1], mmcv.nms(a, scores, 0.3)[1])
    with pytest.raises(TypeError, match="pass one of them"):
        mmcv.nms(a, scores, iou_thr=0.3, iou_threshold=0.3)


def test_batched_nms(device: torch.device) -> None:
    a, scores = boxes(60, device), torch.rand(60, device=device)
    idxs = torch.arange(60, device=device) % 3
    hard = {"type": "nms", "iou_threshold": 0.3, "score_threshold": 0.1, "max_num": 7}
    dets, keep = mmcv.batched_nms(a, scores, idxs, hard)
    want = dlops_triton.batched_nms(a, scores, idxs, 0.3, score_threshold=0.1, max_output=7)
    assert torch.equal(keep, want)
    assert torch.equal(dets, torch.cat([a[want], scores[want, None]], 1))
    for other in ({"split_thr": 10}, {"type": mmcv.nms}):
        assert torch.equal(mmcv.batched_nms(a, scores, idxs.float(), hard | other)[1], keep)
    of_config = mmcv.batched_nms(a, scores, idxs, hard | {"class_agnostic": False}, True)[1]
    assert torch.equal(of_config, keep)
    agnostic = mmcv.batched_nms(a, scores, idxs, {"iou_threshold": 0.3, "split_thr": 1}, True)[1]
    assert torch.equal(agnostic, dlops_triton.nms(a, scores, 0.3))
    soft = {"type": "soft_nms", "iou_threshold": 0.3, "min_score": 0.05}
    dets, keep = mmcv.batched_nms(a, scores, idxs, soft)
    of_class = []
    for c in range(3):
        rows = (idxs == c).nonzero()[:, 0]
        decayed, inds = mmcv.soft_nms(a[rows], scores[rows], 0.3, min_score=0.05)
        of_class += zip(decayed[:, 4].tolist(), rows[inds].tolist(), strict=True)
    assert keep.tolist() == [i for _, i in sorted(of_class, key=lambda pair: -pair[0])]
    assert dets[:, 4].tolist() == sorted((s for s, _ in of_class), reverse=True)
    assert torch.equal(mmcv.batched_nms(a, scores, idxs, soft | {"max_num": 4})[1], keep[:4])
    dets, order = mmcv.batched_nms(a, scores, idxs, None)
    assert torch.equal(order, scores.argsort(descending=True))
    assert torch.equal(dets[:, 4], scores[order])
    with pytest.raises(ValueError, match="must be 'nms' or 'soft_nms', got 'nms_rotated'"):
        mmcv.batched_nms(a, scores, idxs, {"type": "nms_rotated", "iou_threshold": 0.3})


def test_focal_conventions(device: torch.device) -> None:
    """The mean is over N; a class weight multiplies the row of its label; others are background."""
    x = torch.randn(6, 3, device=device)
    y = torch.tensor([0, 1, 2, 3, -1, -100], device=device)
    weight = torch.tensor([1.0, 2, 4], device=device)
    each = mmcv.sigmoid_focal_loss(x, y, 2.0, 0.25, None, "none")
    assert torch.equal(each, dlops_triton.sigmoid_focal_loss(x, y.clamp(min=-1)))
    weighted = mmcv.sigmoid_focal_loss(x, y, 2.0, 0.25, weight, "none")
    row = torch.tensor([[1.0], [2], [4], [1], [1], [1]], device=device)
    torch.testing.assert_close(weighted, each * row)
    for value, total in ((None, each), (weight, weighted)):
        for reduction, divisor in (("mean", 6), ("sum", 1)):
            got = mmcv.sigmoid_focal_loss(x, y, 2.0, 0.25, value, reduction)
            torch.testing.assert_close(got, total.sum() / divisor)
    each = mmcv.softmax_focal_loss(x, y, 2.0, 0.25, weight, "none")
    assert each.shape == (6,)
    assert not each[3:].any()
    p = x.softmax(1)[range(3), range(3)]
    torch.testing.assert_close(each[:3], -0.25 * weight * (1 - p) ** 2 * p.log())
    torch.testing.assert_close(mmcv.softmax_focal_loss(x, y, weight=weight), each.sum() / 6)
    for function in (mmcv.sigmoid_focal_loss, mmcv.softmax_focal_loss):
        assert function(x[:0], y[:0]) == 0
        for bad in (weight[:2], torch.ones(6, device=device), each):
            with pytest.raises(ValueError, match=r"weight must have shape \(3,\), one per class"):
                function(x, y, 2.0, 0.25, bad)
        with pytest.raises(ValueError, match=r"input must have shape \[N, C\], got \(3,\)"):
            function(x[0], y, 2.0, 0.25, weight)
    module = mmcv.SigmoidFocalLoss(2.0, 0.25, weight)
    assert list(module.state_dict()) == ["weight"]
    assert repr(module) == "SigmoidFocalLoss(gamma=2.0, alpha=0.25, reduction=mean)"


def test_deform_layers(device: torch.device) -> None:
    x = torch.rand(2, 4, 6, 6, device=device, dtype=torch.float64)
    layer = mmcv.DeformConv2d(4, 6, 3, padding=1, groups=2, deform_groups=2)
    layer = layer.to(device=device, dtype=torch.float64)
    offset = torch.randn(2, 36, 6, 6, device=device, dtype=torch.float64)
    want = dlops_triton.deform_conv2d(x, offset, layer.weight, padding=1)
    assert torch.equal(layer(x, offset), want)
    mask = torch.rand(2, 18, 6, 6, device=device, dtype=torch.float64)
    second = mmcv.ModulatedDeformConv2d(4, 6, 3, padding=1, groups=2, deform_groups=2).to(
        device=device, dtype=torch.float64
    )
    want = dlops_triton.deform_conv2d(x, offset, second.weight, second.bias, padding=1, mask=mask)
    assert torch.equal(second(x, offset, mask), want)
    # An image smaller than the kernel is padded, and the output cut.
    wide = layer(x[:, :, :2], torch.zeros(2, 36, 2, 6, device=device, dtype=torch.float64))
    assert wide.shape == (2, 6, 2, 6)
    # Everything becomes the offset's dtype.
    assert mmcv.deform_conv2d(x, offset.half(), layer.weight, 1, 1, 1, 2, 2).dtype == torch.half
    halves = mmcv.modulated_deform_conv2d(
        *(x, offset.half(), mask, second.weight, second.bias, 1, 1, 1, 2, 2)
    )
    assert halves.dtype == torch.half
    torch.testing.assert_close(halves.double(), want, rtol=0.01, atol=0.02)
    # What mmcv's ConvModule looks for.
    for module in (layer, second):
        assert not module.transposed
        assert module.output_padding == (0,)
    with pytest.raises(ValueError, match="deform_groups must agree with offset of shape"):
        mmcv.deform_conv2d(x, offset, layer.weight, 1, 1, 1, 2, 1)
    with pytest.raises(ValueError, match="groups must agree with weight of shape"):
        mmcv.deform_conv2d(x, offset, layer.weight, 1, 1, 1, 1, 2)
    with pytest.raises(ValueError, match="must have four dimensions, got shapes"):
        mmcv.deform_conv2d(x, offset, layer.weight[0])
    packs = mmcv.DeformConv2dPack(4, 4, 3), mmcv.ModulatedDeformConv2dPack(4, 4, 3)
    for pack, draw in zip(packs, ("init_offset", "init_weights"), strict=True):
        torch.nn.init.ones_(pack.conv_offset.weight)
        getattr(pack, draw)()
        assert not pack.conv_offset.weight.any()
    with pytest.raises(ValueError, match="bias must be False"):
        mmcv.DeformConv2d(4, 6, 3, bias=True)
    with pytest.warns(DeprecationWarning, match="deformable_groups is called deform_groups now"):
        assert mmcv.DeformConv2dPack(4, 4, 3, deformable_groups=2).deform_groups == 2
