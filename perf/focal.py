"""Benchmark of the sigmoid focal loss, with int64 labels as a detector has them.

Bytes: "sum" reads the logits and the labels; with the gradient, which a forward pass can compute
at once, it writes that too. "none" writes the losses, and its backward has to read the logits
again, and the gradient of the losses, and to write one. Operations: 16 per element forward and 20
with the gradient, the shortest machine code that was compiled for sm_90 (2 special functions).
"planes" is how many planes of rows, one per class, a head's output has in memory: its logits are
read through their strides.

torchvision takes dense targets in the dtype of the logits. They are made before the clock starts,
which favours it. The eager formula computes in fp32, as a loss should.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton import sigmoid_focal_loss
from dlops_triton.reference import focal as reference

from .bench import Arrays, Bench, Case, Inputs, Work, compiled, optional

ALPHA, GAMMA = 0.25, 2.0


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits of an untrained head, and labels of which one in a hundred is positive."""
    n, c = case.sizes["n"], case.sizes["c"]
    g = torch.Generator(device).manual_seed(0)
    planes = case.sizes.get("planes", 0)
    shape = (planes, c, n // planes) if planes else (n, c)
    inputs = torch.randn(shape, generator=g, dtype=dtype, device=device).sub_(4)
    labels = torch.randint(0, c, (n,), generator=g, device=device)
    background = torch.rand(n, generator=g, device=device) > 0.01
    labels.masked_fill_(background, c)
    if planes:
        inputs, labels = inputs.mT, labels.view(planes, -1)
    made = {"inputs": inputs, "labels": labels}
    if case.option == "none":
        made["grad"] = torch.randn(n, c, generator=g, dtype=dtype, device=device)
    return made


def formula(inputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    x = inputs if inputs.dtype == torch.float64 else inputs.float()
    classes = torch.arange(x.shape[-1], device=x.device)
    t = (labels[..., None] == classes).to(x.dtype)
    p = x.sigmoid()
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = (ALPHA * t + (1 - ALPHA) * (1 - t)) * (p * (1 - t) + (1 - p) * t) ** GAMMA * bce
    return loss.sum() if reduction == "sum" else loss.to(inputs.dtype)


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: sigmoid_focal_loss(i["inputs"], i["labels"], ALPHA, GAMMA, case.option)  # type: ignore[arg-type]


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: formula(i["inputs"], i["labels"], case.option)


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: compiled(formula)(i["inputs"], i["labels"], case.option)


def _torchvision(case: Case, i: Inputs) -> Callable[[], Tensor]:
    loss = optional("torchvision.ops").sigmoid_focal_loss
    c = case.sizes["c"]
    dense = F.one_hot(i["labels"], c + 1)[..., :c].to(i["inputs"].dtype)
    return lambda: loss(i["inputs"], dense, ALPHA, GAMMA, case.option)


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    x, labels = i["inputs"].float().numpy(), i["labels"].numpy()
    loss = reference.sigmoid_focal_loss(x, labels, ALPHA, GAMMA)
    out = loss.sum() if case.option == "sum" else loss
    if mode == "fwd":
        return (out,)
    grad = i["grad"].float().numpy() if "grad" in i else 1.0
    return out, reference.sigmoid_focal_loss_grad(x, labels, ALPHA, GAMMA) * grad


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    passes = {"sum": {"fwd": 1, "fwd+bwd": 2}, "none": {"fwd": 2, "fwd+bwd": 5}}[case.option][mode]
    label_passes = 2 if (case.option, mode) == ("none", "fwd+bwd") else 1
    n, c = case.sizes["n"], case.sizes["c"]
    return passes * itemsize * n * c + label_passes * 8 * n


def _operations(case: Case, mode: str) -> int:
    per_element = {"fwd": 16, "fwd+bwd": 20}[mode]
    return per_element * case.sizes["n"] * case.sizes["c"]


def _case(n: int) -> Case:
    return Case(f"{n}x80", {"n": n, "c": 80}, _SMALL, option="sum")


_WORK = Work(elements=lambda s: s["n"] * s["c"], block=lambda k: k["BLOCK"])
_LOOP = Work(_WORK.elements, _WORK.block, loop=True)
# Finds an incoming gradient of 1, and moves nothing.
SCALE_WORK = Work(elements=lambda s: 0, block=lambda k: k["BLOCK"])
_SETTINGS = {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
_SMALL = {"n": 512, "c": 80}

BENCH = Bench(
    name="focal",
    cases=(
        Case("retinanet", {"n": 193_000, "c": 80}, _SMALL, option="sum"),  # 800 x 1333 pixels
        Case("retinanet-none", {"n": 193_000, "c": 80}, _SMALL, option="none"),
        Case("retinanet-batch8", {"n": 1_500_000, "c": 80}, _SMALL, option="sum"),
        Case("objects365-batch8", {"n": 1_500_000, "c": 365}, {"n": 512, "c": 365}, option="sum"),
        Case(
            "retinanet-p3-nchw",  # 9 anchors at each of 100 x 152 places
            {"n": 9 * 15_200, "c": 80, "planes": 9},
            _SMALL | {"planes": 1},
            option="sum",
        ),
    ),
    small=tuple(map(_case, (2**10, 2**12, 2**14))),
    sweep=tuple(map(_case, (2**16, 2**18, 2**20))),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile, "torchvision": _torchvision},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        "focal_sum": {"BLOCK": (1024, 2048, 4096), "BLOCKS": (4, 8, 16), "num_warps": (1, 2, 4)},
        "focal_fwd": _SETTINGS,
        "focal_bwd": _SETTINGS,
    },
    kernels={
        "focal_rows_kernel": _LOOP,
        "focal_columns_kernel": _LOOP,
        "focal_fwd_kernel": _WORK,
        "focal_bwd_kernel": _WORK,
        "scale_kernel": SCALE_WORK,
    },
    leaves=("inputs",),
)
