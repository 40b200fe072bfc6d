"""A call of every public op and module: what the tests of test_torch_*.py go through.

`test_torch_compile.py` fails where ``dlops_triton.__all__`` has an op, or ``dlops_triton.nn`` a
module, of which there is no call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dlops_triton as d
from dlops_triton.nn import GHMC, GHMR, DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack

FAMILIES = {file.stem for file in (Path(__file__).parents[1] / "kernels").glob("[a-z]*.py")}
# The public functions that have kernels.
OPS = {
    name
    for name in d.__all__
    if getattr(getattr(d, name), "__module__", "").rpartition(".")[2] in FAMILIES
}

Device = torch.device | str
Made = tuple[Tensor, ...]


def boxes(*shape: int, device: Device = "cpu") -> Tensor:
    corner = torch.rand(*shape, 2, device=device) * 50
    return torch.cat([corner, corner + 1 + torch.rand(*shape, 2, device=device) * 30], -1)


def rows(device: Device, n: int) -> Made:
    """Logits and labels, of which some are background."""
    return torch.randn(n, 5, device=device), torch.randint(-1, 7, (n,), device=device)


def dense(device: Device, n: int) -> Made:
    return torch.randn(n, 5, device=device), torch.rand(n, 5, device=device)


def pairs(device: Device, n: int) -> Made:
    return boxes(n, device=device), boxes(n, device=device)


def sets(device: Device, n: int) -> Made:
    return boxes(n, device=device), boxes(n + 2, device=device)


def detections(device: Device, n: int) -> Made:
    classes = torch.randint(0, 3, (n,), device=device)
    return boxes(n, device=device), torch.rand(n, device=device), classes


def images(device: Device, n: int) -> Made:
    classes, valid = (torch.randint(1, n, size, device=device) for size in ((2, n), (2,)))
    return boxes(2, n, device=device), torch.rand(2, n, device=device), classes, valid


def maps(device: Device, n: int) -> Made:
    """n images, offsets and a mask."""
    sizes = (n, 4, 3, 3), (n, 8, 2, 2), (n, 4, 2, 2)
    return tuple(torch.randn(size, device=device) for size in sizes)


def convolved(device: Device, n: int) -> Made:
    x, offset, mask = maps(device, n)
    return x, offset, mask, torch.randn(6, 4, 2, 2, device=device)


@dataclass(frozen=True)
class Call:
    """``make()`` gives what is called with the tensors of ``tensors(device, n)``."""

    make: Callable[[], Callable[..., Any]]
    tensors: Callable[[Device, int], Made]
    gradients: int = 0  # so many first tensors get one
    data_sized: str = ""  # the form with a fixed size, where the size of the result is data
    growing: tuple[int, ...] = (0, 0, 0, 0)  # the dimension of each tensor that is of size n

    def results(self, called: Callable[..., Any], tensors: Made) -> Made:
        result = called(*tensors)
        return result if isinstance(result, tuple) else (result,)

    def leaves(self, device: Device, n: int, seed: int = 0) -> Made:
        """Tensors, of which those that get a gradient require one."""
        torch.manual_seed(seed)
        made = self.tensors(device, n)
        return tuple(t.requires_grad_(i < self.gradients) for i, t in enumerate(made))

    def differentiated(self, called: Callable[..., Any], leaves: Made) -> tuple[Made, Made]:
        """The results and, weighed unevenly, the gradients of what requires one."""
        results = self.results(called, leaves)
        if not self.gradients:
            return results, ()
        total = weighed(results[0])
        wanted = [*leaves[: self.gradients], *parameters(called)]
        return results, torch.autograd.grad(total, wanted)


def weighed(t: Tensor) -> Tensor:
    """A sum in which no two elements are worth the same."""
    weights = torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device)
    return (t * weights.view(t.shape)).sum()


def parameters(called: Callable[..., Any]) -> list[Tensor]:
    return list(called.parameters()) if isinstance(called, nn.Module) else []


def function(call: Callable[..., Any], tensors: Any, gradients: int = 0, **others: Any) -> Call:
    return Call(lambda: call, tensors, gradients, **others)


def filled(module: nn.Module) -> nn.Module:
    """With parameters that are not zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


# By op, and what kind of call of it.
FUNCTIONS: dict[str, Call] = {
    "batched_nms": function(
        lambda b, s, c: d.batched_nms(b, s, c, 0.5), detections, data_sized="nms_padded"
    ),
    "box_iou": function(lambda a, b: d.box_iou(a, b), sets, 2),
    "box_match": function(lambda a, b: d.box_match(a, b), sets),
    "complete_box_iou": function(lambda a, b: d.complete_box_iou(a, b), sets, 2),
    "complete_box_iou_loss": function(lambda a, b: d.complete_box_iou_loss(a, b), pairs, 2),
    "complete_box_iou_loss, mean": function(
        lambda a, b: d.complete_box_iou_loss(a, b, "mean"), pairs, 2
    ),
    "deform_conv2d": function(
        lambda x, o, m, w: d.deform_conv2d(x, o, w, mask=m.sigmoid()), convolved, 4,
        growing=(0, 0, 0, -1),
    ),
    "deform_sample": function(
        lambda x, o, m: d.deform_sample(x, o, 2, mask=m.sigmoid()), maps, 3
    ),
    "distance_box_iou": function(lambda a, b: d.distance_box_iou(a, b), sets, 2),
    "distance_box_iou_loss": function(lambda a, b: d.distance_box_iou_loss(a, b, "sum"), pairs, 2),
    "generalized_box_iou": function(lambda a, b: d.generalized_box_iou(a, b), sets, 2),
    "generalized_box_iou_loss": function(lambda a, b: d.generalized_box_iou_loss(a, b), pairs, 2),
    "ghmc_loss": function(lambda x, t: d.ghmc_loss(x, t), rows, 1),
    "ghmc_loss, none": function(lambda x, t: d.ghmc_loss(x, t, reduction="none"), dense, 1),
    "ghmr_loss": function(lambda x, t: d.ghmr_loss(x, t), dense, 1),
    "nms": function(lambda b, s, c: d.nms(b, s, 0.5), detections, data_sized="nms_padded"),
    "nms_padded": function(
        lambda b, s, c, v: d.nms_padded(b, s, 0.5, idxs=c, valid=v, max_output=4),
        images, growing=(1, 1, 1, -1),
    ),
    "sigmoid_focal_loss": function(lambda x, t: d.sigmoid_focal_loss(x, t), rows, 1),
    "sigmoid_focal_loss, sum": function(
        lambda x, t: d.sigmoid_focal_loss(x, t, reduction="sum"), rows, 1
    ),
    "sigmoid_focal_loss, mean": function(
        lambda x, t: d.sigmoid_focal_loss(
            x, t, reduction="mean", avg_factor=(t >= 0).sum().clamp(min=1)
        ),
        rows, 1,
    ),
    "sigmoid_focal_loss, dense": function(
        lambda x, t: d.sigmoid_focal_loss(x, t, reduction="mean"), dense, 1
    ),
    "soft_nms": function(
        lambda b, s, c: d.soft_nms(b, s, idxs=c), detections, data_sized="soft_nms_padded"
    ),
    "soft_nms_padded": function(
        lambda b, s, c, v: d.soft_nms_padded(b, s, idxs=c, valid=v, max_output=4),
        images, growing=(1, 1, 1, -1),
    ),
    "softmax_focal_loss": function(lambda x, t: d.softmax_focal_loss(x, t), rows, 1),
    "softmax_focal_loss, none": function(
        lambda x, t: d.softmax_focal_loss(x, t, alpha=0.5, reduction="none"), rows, 1
    ),
}  # fmt: skip

MODULES: dict[str, Call] = {
    "GHMC": Call(lambda: GHMC(momentum=0.75, bias_correction=True), rows, 1),
    "GHMR": Call(lambda: GHMR(momentum=0.75), dense, 1),
    "DeformConv2d": Call(lambda: filled(DeformConv2d(4, 6, 2)), maps, 3),
    "DeformConv2dPack": Call(lambda: filled(DeformConv2dPack(4, 6, 2)), lambda *a: maps(*a)[:1], 1),
    "ModulatedDeformConv2dPack": Call(
        lambda: filled(ModulatedDeformConv2dPack(4, 6, 2)), lambda *a: maps(*a)[:1], 1
    ),
}

CALLS = FUNCTIONS | MODULES
FIXED = {name: call for name, call in CALLS.items() if not call.data_sized}
DIFFERENTIABLE = {name: call for name, call in CALLS.items() if call.gradients}


def made(call: Call, device: Device) -> Callable[..., Any]:
    """What is called, the same each time, on the device."""
    torch.manual_seed(1)
    with torch.device(device):
        return call.make()
