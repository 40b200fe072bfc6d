"""Benchmark of the softmax focal loss, with int64 labels.

Bytes: "sum" reads the logits and the labels; with the gradient, which a forward pass can compute
at once, it writes that too. "none" writes a loss per row, and its backward reads the logits again.
Operations: 10 per logit forward (unpack, maximum, difference, scale, exp, and the sums without the
label's) and 14 with the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlops_triton import softmax_focal_loss
from dlops_triton.reference import softmax_focal as reference

from .bench import Arrays, Bench, Case, Inputs, Work, compiled
from .focal import SCALE_WORK

GAMMA = 2.0


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    n, c = case.sizes["n"], case.sizes["c"]
    planes = case.sizes.get("planes", 0)
    g = torch.Generator(device).manual_seed(0)
    shape = (planes, c, n // planes) if planes else (n, c)
    inputs = torch.randn(shape, generator=g, dtype=dtype, device=device)
    labels = torch.randint(0, c, shape[:1] + shape[2:], generator=g, device=device)
    made = {"inputs": inputs, "labels": labels}
    if case.option == "none":
        made["grad"] = torch.randn(labels.shape, generator=g, dtype=dtype, device=device)
    return made


def formula(inputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    x = inputs if inputs.dtype == torch.float64 else inputs.float()
    log_p = x.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    loss = -((1 - log_p.exp()) ** GAMMA) * log_p
    return loss.sum() if reduction == "sum" else loss.to(inputs.dtype)


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: softmax_focal_loss(i["inputs"], i["labels"], None, GAMMA, case.option)  # type: ignore[arg-type]


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: formula(i["inputs"], i["labels"], case.option)


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: compiled(formula)(i["inputs"], i["labels"], case.option)


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    args = (i["inputs"].float().numpy(), i["labels"].numpy(), None, GAMMA)
    loss = reference.softmax_focal_loss(*args)
    out = loss.sum() if case.option == "sum" else loss
    if mode == "fwd":
        return (out,)
    grad = i["grad"].float().numpy()[:, None] if "grad" in i else 1.0
    return out, reference.softmax_focal_loss_grad(*args) * grad


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    n, c = case.sizes["n"], case.sizes["c"]
    if case.option == "sum":
        return {"fwd": 1, "fwd+bwd": 2}[mode] * itemsize * n * c + 8 * n
    # The losses; backward: a gradient of each, and the labels again.
    rows = {"fwd": 8 + itemsize, "fwd+bwd": 2 * (8 + itemsize)}[mode]
    return {"fwd": 1, "fwd+bwd": 3}[mode] * itemsize * n * c + rows * n


def _operations(case: Case, mode: str) -> int:
    return {"fwd": 10, "fwd+bwd": 14}[mode] * case.sizes["n"] * case.sizes["c"]


def _case(n: int) -> Case:
    return Case(f"{n}x80", {"n": n, "c": 80}, _SMALL, option="sum")


def _elements(sizes: object) -> float:
    return float(sizes["n"] * sizes["c"])  # type: ignore[index]


_SMALL = {"n": 512, "c": 80}
_UNEVEN = {"n": 520, "c": 80}  # not a multiple of 16, as 193,000

BENCH = Bench(
    name="softmax_focal",
    cases=(
        Case("retinanet", {"n": 193_000, "c": 80}, _UNEVEN, option="sum"),
        Case("retinanet-none", {"n": 193_000, "c": 80}, _UNEVEN, option="none"),
        Case("retinanet-batch8", {"n": 1_500_000, "c": 80}, _SMALL, option="sum"),
        Case("objects365-batch8", {"n": 1_500_000, "c": 365}, {"n": 512, "c": 365}, option="sum"),
        Case(
            "cityscapes-4x512x1024",
            {"n": 4 * 512 * 1024, "c": 19, "planes": 4},
            {"n": 512, "c": 19, "planes": 1},
            option="sum",
        ),
        Case("faces-100k", {"n": 1024, "c": 100_000}, {"n": 16, "c": 20_000}, option="sum"),
    ),
    small=tuple(map(_case, (2**10, 2**12, 2**14))),
    sweep=tuple(map(_case, (2**16, 2**18, 2**20))),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        "softmax_focal": {"num_warps": (2, 4, 8)},
        "softmax_focal_long": {"BLOCK": (1024, 2048, 4096), "num_warps": (4, 8)},
    },
    kernels={
        # A tile's rows, and the classes of both its tiles.
        "softmax_focal_kernel": Work(
            _elements, lambda k: 4096 // k["BLOCK"] * (k["BLOCK"] + k["REST"])
        ),
        "softmax_focal_long_kernel": Work(_elements, lambda k: k["BLOCK"] * k["ROWS"], loop=True),
        "scale_kernel": SCALE_WORK,
    },
    leaves=("inputs",),
)
