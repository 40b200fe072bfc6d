"""``dlops_triton.compat.torchvision`` without torchvision: signatures, dtypes, errors, formulas."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlops_triton
from dlops_triton.compat import torchvision as tv

SIGNATURES = {
    "nms": "boxes, scores, iou_threshold",
    "batched_nms": "boxes, scores, idxs, iou_threshold",
    "box_iou": "boxes1, boxes2, fmt='xyxy'",
    "generalized_box_iou": "boxes1, boxes2",
    "distance_box_iou": "boxes1, boxes2, eps=1e-07",
    "complete_box_iou": "boxes1, boxes2, eps=1e-07",
    "sigmoid_focal_loss": "inputs, targets, alpha=0.25, gamma=2, reduction='none'",
    "generalized_box_iou_loss": "boxes1, boxes2, reduction='none', eps=1e-07",
    "distance_box_iou_loss": "boxes1, boxes2, reduction='none', eps=1e-07",
    "complete_box_iou_loss": "boxes1, boxes2, reduction='none', eps=1e-07",
    "deform_conv2d": "input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), "
    "dilation=(1, 1), mask=None",
    "DeformConv2d": "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, "
    "groups=1, bias=True",
}


def plain(function: Any) -> str:
    """A signature without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


def boxes(n: int, device: torch.device, scale: float = 50) -> Tensor:
    corner = torch.rand(n, 2, device=device) * scale
    return torch.cat([corner, corner + torch.rand(n, 2, device=device) * scale], 1)


def test_signatures() -> None:
    assert {name: plain(getattr(tv, name)) for name in tv.__all__} == SIGNATURES


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_losses_are_torchvisions(device: torch.device, dtype: torch.dtype) -> None:
    """Focal loss keeps its input's, reduced or not; box losses and IoU are fp32 at least."""
    x = torch.randn(4, 3, device=device).to(dtype).requires_grad_()
    exact = torch.promote_types(dtype, torch.float32)
    a, b = boxes(4, device).to(dtype), boxes(4, device).to(dtype)
    for reduction in ("none", "mean", "sum"):
        loss = tv.sigmoid_focal_loss(x, torch.rand_like(x), reduction=reduction)
        assert loss.dtype == dtype
        assert tv.generalized_box_iou_loss(a, b, reduction).dtype == exact
        assert tv.distance_box_iou_loss(a, b, reduction).dtype == exact
        assert tv.complete_box_iou_loss(a, b, reduction).dtype == exact
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    for function in (
        tv.box_iou,
        tv.generalized_box_iou,
        tv.distance_box_iou,
        tv.complete_box_iou,
    ):
        assert function(a, b).dtype == exact
        assert function(a, b).shape == (4, 4)


def test_dtypes_of_focal_loss_are_promoted(device: torch.device) -> None:
    """A half-precision model under autocast: torchvision's sum is fp32, which does not overflow."""
    x = torch.full((300, 300), 6.0, device=device, dtype=torch.half)
    t = torch.zeros_like(x)
    for gamma in (0, 2):
        for reduction in ("none", "mean", "sum"):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = tv.sigmoid_focal_loss(x, t, gamma=gamma, reduction=reduction)
            want = tv.sigmoid_focal_loss(x.float(), t.float(), gamma=gamma, reduction=reduction)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
            for dtype in (torch.float32, torch.float64):
                of_target = tv.sigmoid_focal_loss(x, t.to(dtype), 0.25, gamma, reduction)
                assert of_target.dtype == dtype
                torch.testing.assert_close(of_target, want.to(dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_boxes(device: torch.device, dtype: torch.dtype) -> None:
    a = boxes(6, device).to(dtype)
    got, want = tv.box_iou(a, a), dlops_triton.box_iou(a.double(), a.double())
    assert torch.equal(got, want.float())
    assert torch.equal(tv.box_iou(a, a.float()), got)
    assert tv.box_iou(a.half(), a).dtype == torch.float32
    same = tv.distance_box_iou_loss(a, a)
    assert torch.equal(same, dlops_triton.distance_box_iou_loss(a.float(), a.float()))
    if dtype == torch.int64:  # areas that fp32 does not hold
        a = torch.tensor([[0, 0, 2**24 + 1, 2**24 + 1], [0, 0, 2**24, 2**24]], device=device)
        assert tv.box_iou(a, a)[0, 1] == torch.tensor(2**48 / (2**24 + 1) ** 2) != 1


def test_formats_and_broadcasting(device: torch.device) -> None:
    a, b = boxes(5, device), boxes(3, device)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    want = dlops_triton.box_iou(a, b)
    corner = [torch.cat([x[:, :2], s], 1) for x, s in ((a, size_a), (b, size_b))]
    centre = [torch.cat([x[:, :2] + s / 2, s], 1) for x, s in ((a, size_a), (b, size_b))]
    torch.testing.assert_close(tv.box_iou(*corner, fmt="xywh"), want)
    torch.testing.assert_close(tv.box_iou(*centre, fmt="cxcywh"), want)
    assert tv.box_iou(a, b.expand(2, 1, 3, 4)).shape == (2, 1, 5, 3)
    losses = tv.generalized_box_iou_loss(a, b[0])
    assert torch.equal(losses, tv.generalized_box_iou_loss(a, b[0].expand(5, 4)))
    assert tv.complete_box_iou_loss(a[0], b[0]).shape == ()
    for function in (tv.box_iou, tv.generalized_box_iou_loss):
        assert torch.equal(function(a, a.double()), function(a.double(), a.double()))
    with pytest.raises(ValueError, match="fmt must be one of 'xyxy', 'xywh', 'cxcywh', got 'yx'"):
        tv.box_iou(a, b, "yx")


def test_focal_loss_is_torchvisions_formula(device: torch.device) -> None:
    x = torch.randn(30, 7, device=device, dtype=torch.float64, requires_grad=True)
    t = torch.rand(30, 7, device=device, dtype=torch.float64)
    for alpha in (0.25, -1, 0.0):
        for gamma in (0, 2, 1.5):
            p = x.sigmoid()
            p_t = p * t + (1 - p) * (1 - t)
            want = F.binary_cross_entropy_with_logits(x, t, reduction="none") * (1 - p_t) ** gamma
            if alpha >= 0:
                want = want * (alpha * t + (1 - alpha) * (1 - t))
            got = tv.sigmoid_focal_loss(x, t, alpha, gamma)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
            for a, b in (
                (got.sum(), want.sum()),
                (tv.sigmoid_focal_loss(x, t, alpha, gamma, "mean"), want.mean()),
            ):
                torch.testing.assert_close(
                    *(torch.autograd.grad(y, x, retain_graph=True)[0] for y in (a, b)),
                    rtol=1e-9,
                    atol=1e-12,
                )
    assert torch.equal(tv.sigmoid_focal_loss(x[0, 0], t[0, 0]), tv.sigmoid_focal_loss(x, t)[0, 0])
    hard = tv.sigmoid_focal_loss(x.float(), t > 0.5)
    assert torch.equal(hard, tv.sigmoid_focal_loss(x.float(), (t > 0.5).long()))


def test_focal_loss_without_focus_is_torchs_cross_entropy_to_the_last_bit() -> None:
    """Callers compare the two with <=."""
    x, t = torch.randn(500), torch.rand(500)
    want = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    assert torch.equal(tv.sigmoid_focal_loss(x, t, -1, 0), want)
    with pytest.raises(ValueError, match="alpha must be in"):
        tv.sigmoid_focal_loss(x, t, 2.0, 0)


def test_errors_are_torchvisions(device: torch.device) -> None:
    a, scores = boxes(3, device), torch.rand(3, device=device)
    for bad in ((a[0], scores), (a[:, :3], scores), (a, scores[:, None]), (a, scores[:2])):
        with pytest.raises(RuntimeError, match="must have shape"):
            tv.nms(*bad, 0.5)
        with pytest.raises(RuntimeError, match="must have shape"):
            tv.batched_nms(*bad, torch.zeros(3, device=device), 0.5)
    for loss in (tv.sigmoid_focal_loss, tv.generalized_box_iou_loss, tv.complete_box_iou_loss):
        with pytest.raises(ValueError, match="Invalid reduction: 'xyz'"):
            loss(a, a, reduction="xyz")
    image, offset = torch.rand(1, 2, 4, 4, device=device), torch.zeros(1, 8, 3, 3, device=device)
    weight = torch.rand(3, 2, 2, 2, device=device)
    with pytest.raises(RuntimeError, match="the shape of the offset"):
        tv.deform_conv2d(image, offset[:, :2], weight)
    with pytest.raises(RuntimeError, match=r"mask.shape\[1\] is not valid"):
        tv.deform_conv2d(image, offset, weight, mask=offset[:, :3])
    with pytest.raises(RuntimeError, match="bias must have shape"):
        tv.deform_conv2d(image, offset, weight, bias=scores[:2])


def test_nms_takes_what_torchvision_takes(device: torch.device) -> None:
    a, scores = boxes(40, device), torch.rand(40, device=device)
    want = dlops_triton.nms(a, scores, 0.3)
    assert torch.equal(tv.nms(a, scores, 0.3), want)
    assert torch.equal(tv.nms(a, scores, torch.tensor(0.3)), want)  # type: ignore[arg-type]
    by_score = scores.argsort(descending=True, stable=True)
    assert torch.equal(tv.nms(a, scores, 1.5), by_score)
    assert torch.equal(tv.batched_nms(a, scores, by_score, 1.5), by_score)
    assert tv.batched_nms(a[:0], None, None, None).shape == (0,)  # type: ignore[arg-type]
    classes = torch.arange(40, device=device) % 3
    want = dlops_triton.batched_nms(a, scores, classes, 0.3)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32, torch.half):
        assert torch.equal(tv.batched_nms(a, scores, classes.to(dtype), 0.3), want)
    assert torch.equal(tv.batched_nms(a, scores, classes / 4, 0.3), want)
    same = dlops_triton.batched_nms(a, scores, (classes > 0).long(), 0.3)
    assert torch.equal(tv.batched_nms(a, scores, classes > 0, 0.3), same)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_nms_of_quantized_boxes() -> None:
    a, scores = boxes(40, torch.device("cpu")), torch.rand(40) * 100
    quantized = [torch.quantize_per_tensor(t, 2, 50, torch.quint8) for t in (a, scores)]
    want = tv.nms(quantized[0].dequantize(), quantized[1].dequantize(), 0.3)
    assert torch.equal(tv.nms(*quantized, 0.3), want)


def test_classes_are_compared_not_shifted(device: torch.device) -> None:
    """What the coordinate trick gets wrong; see docs/differences.md."""
    inf = float("inf")
    negative = torch.tensor([[0.0, 0, 100, 100], [-101, -101, -1, -1]], device=device)
    scores = torch.tensor([0.9, 0.8], device=device)
    idxs = torch.tensor([0, 1], device=device)
    shifted = negative + (idxs * (negative.max() + 1))[:, None]
    assert tv.nms(shifted, scores, 0.5).tolist() == [0]
    assert tv.batched_nms(negative, scores, idxs, 0.5).tolist() == [0, 1]
    twice = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, inf, 9]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.1], device=device)
    kept = tv.batched_nms(twice, scores, torch.zeros(3, device=device), 0.5)
    assert kept.tolist() == [0, 2]


def test_deform_conv_is_the_librarys(device: torch.device) -> None:
    image = torch.rand(2, 4, 5, 5, device=device, dtype=torch.float64)
    offset = torch.randn(2, 8, 4, 4, device=device, dtype=torch.float64)
    weight = torch.rand(6, 4, 2, 2, device=device, dtype=torch.float64)
    mask = torch.rand(2, 4, 4, 4, device=device, dtype=torch.float64)
    bias = torch.rand(6, device=device, dtype=torch.float64)
    got = tv.deform_conv2d(image, offset, weight, bias, (1, 1), (0, 0), (1, 1), mask)
    want = dlops_triton.deform_conv2d(image, offset, weight, bias, mask=mask)
    assert torch.equal(got, want)
    # Autocast computes in fp32 and returns the input's dtype; fp64 it leaves alone.
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(tv.deform_conv2d(image, offset, weight, bias, mask=mask), want)
        half = tv.deform_conv2d(image.half(), offset.float(), weight.float())
    single = dlops_triton.deform_conv2d(image.half().float(), offset.float(), weight.float())
    assert half.dtype == torch.half
    assert torch.equal(half, single.half())


class Detector(nn.Module):
    """Calls every function of the namespace."""

    def forward(self, x: Tensor, a: Tensor, scores: Tensor, offset: Tensor) -> list[Tensor]:
        loss = tv.sigmoid_focal_loss(x, x.detach().sigmoid(), gamma=2.0, reduction="sum")
        iou = tv.box_iou(a, a) + tv.generalized_box_iou(a, a)
        iou = iou + tv.distance_box_iou(a, a) + tv.complete_box_iou(a, a)
        boxed = tv.generalized_box_iou_loss(a, a + 1, "sum") + tv.distance_box_iou_loss(a, a).sum()
        boxed = boxed + tv.complete_box_iou_loss(a, a + 1, reduction="mean")
        kept = tv.nms(a, scores, 0.5)
        image = x[None, None]
        out = tv.deform_conv2d(image, offset, torch.ones_like(image[:, :, :1, :1]), stride=(1, 1))
        return [loss, iou, boxed, kept, tv.batched_nms(a, scores, kept * 0, 0.5), out]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_scripted_models_call_back(device: torch.device, tmp_path: Path) -> None:
    a, scores = boxes(9, device), torch.rand(9, device=device)
    x = torch.randn(3, 4, device=device)
    offset = torch.zeros(1, 2, 3, 4, device=device)
    model = Detector()
    scripted = torch.jit.script(model)
    for got, want in zip(scripted(x, a, scores, offset), model(x, a, scores, offset), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(torch.jit.script(tv.box_iou)(a, a), tv.box_iou(a, a))
    assert torch.equal(torch.jit.script(tv.nms)(a, scores, 0.5), tv.nms(a, scores, 0.5))
    with pytest.raises(RuntimeError, match="Could not export Python function"):
        scripted.save(tmp_path / "model.pt")


@pytest.mark.filterwarnings("default")
def test_torch_compile(device: torch.device) -> None:
    a, x = boxes(9, device), torch.randn(3, 4, device=device, requires_grad=True)

    def step(x: Tensor, a: Tensor) -> Tensor:
        loss = tv.sigmoid_focal_loss(x, x.detach().sigmoid(), reduction="mean")
        return loss + tv.complete_box_iou_loss(a, a + 1, "sum") + tv.box_iou(a, a).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, a), step(x, a))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, a), x), torch.autograd.grad(step(x, a), x)
    )


def test_meta_tensors() -> None:
    """Models are also made where there is no memory and no autocast."""
    x, a = torch.zeros(4, 3, device="meta"), torch.zeros(4, 4, device="meta")
    assert tv.sigmoid_focal_loss(x.half(), x.half(), reduction="sum").dtype == torch.half
    assert tv.box_iou(a, a[:2]).shape == (4, 2)
    assert tv.generalized_box_iou_loss(a, a).shape == (4,)
    image, offset = (torch.zeros(1, c, 4, 4, device="meta") for c in (2, 2))
    assert tv.deform_conv2d(image, offset, image[:, :, :1, :1]).shape == (1, 1, 4, 4)
