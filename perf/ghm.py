"""Benchmark of GHM-C without momentum: "mean", with int64 labels as a detector has them; "dense",
the same with dense targets and label weights, as mmdet makes of them; and "none".

Bytes: no element has a weight before all have been counted, so logits and labels are read twice,
and the gradient is written; where they fit the L2 cache, the second time is cheaper than these
bytes say. Operations: 3 per element to count, for few elements are beyond the first bins, and 28
for the loss, 32 with the gradient (2 special functions and 2 look-ups).

"mmdet" is its algorithm: a loop over the bins, each with masks over all elements, of which the host
reads the count. "eager" is the formula without a loop: a bin from searching the edges, counts from
a scatter of integers; and "compile" is that compiled. All compute in fp32, as a loss should.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dlops_triton import ghmc_loss
from dlops_triton.reference import ghm as reference

from .bench import AbsentError, Arrays, Bench, Case, Inputs, Work, compiled
from .focal import SCALE_WORK

BINS = 30  # the paper's


def make(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Logits of an untrained head, and labels of which one in a hundred is positive."""
    n, c = case.sizes["n"], case.sizes["c"]
    g = torch.Generator(device).manual_seed(0)
    inputs = torch.randn(n, c, generator=g, dtype=dtype, device=device).sub_(4)
    labels = torch.randint(0, c, (n,), generator=g, device=device)
    background = torch.rand(n, generator=g, device=device) > 0.01
    labels.masked_fill_(background, c)
    edges = torch.from_numpy(reference.edges(BINS, None)).to(device)
    made = {"inputs": inputs, "labels": labels, "edges": edges}
    if case.option == "dense":
        made["labels"] = one_hot(labels, c)
        made["weights"] = torch.ones(n, c, device=device)
    elif case.option == "none":
        made["grad"] = torch.randn(n, c, generator=g, dtype=dtype, device=device)
    return made


def one_hot(labels: Tensor, c: int) -> Tensor:
    return (labels[:, None] == torch.arange(c, device=labels.device)).float()


def _terms(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, dense targets, the norm of the gradient, and what counts."""
    x, labels = i["inputs"].float(), i["labels"]
    t = labels if labels.dim() == 2 else one_hot(labels, x.shape[1])
    valid = i["weights"] > 0 if "weights" in i else torch.ones_like(t, dtype=torch.bool)
    return x, t, (x.detach().sigmoid() - t).abs(), valid


def formula(i: Inputs, reduction: str) -> Tensor:
    """Without a loop, and without the host."""
    x, t, g, valid = _terms(i)
    member = torch.bucketize(g, i["edges"], right=True) - 1
    counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(0, member.flatten(), valid.flatten().long())
    share = 1 / (counts.clamp(min=1) * (counts > 0).sum())
    weights = share[member] * valid
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    if reduction == "none":
        return (bce * (weights * valid.sum())).to(i["inputs"].dtype)
    return (bce * weights).sum()


def loop(i: Inputs, reduction: str) -> Tensor:
    """Bin by bin."""
    x, t, g, valid = _terms(i)
    total = max(float(valid.sum()), 1.0)
    weights, filled = torch.zeros_like(g), 0
    for k in range(BINS):
        inside = (g >= i["edges"][k]) & (g < i["edges"][k + 1]) & valid
        count = int(inside.sum())
        if count > 0:
            weights[inside] = total / count
            filled += 1
    weights = weights / max(filled, 1)
    loss = F.binary_cross_entropy_with_logits(x, t, reduction="none") * weights
    return loss.to(i["inputs"].dtype) if reduction == "none" else loss.sum() / total


def _reduction(case: Case) -> str:
    return "none" if case.option == "none" else "mean"


def _ours(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: ghmc_loss(
        i["inputs"], i["labels"], i.get("weights"), bins=BINS, reduction=_reduction(case)  # type: ignore[arg-type]
    )  # fmt: skip


def _eager(case: Case, i: Inputs) -> Callable[[], Tensor]:
    _limit(case)
    return lambda: formula(i, _reduction(case))


def _compile(case: Case, i: Inputs) -> Callable[[], Tensor]:
    return lambda: compiled(formula)(i, _reduction(case))


def _mmdet(case: Case, i: Inputs) -> Callable[[], Tensor]:
    _limit(case)
    return lambda: loop(i, _reduction(case))


def _limit(case: Case) -> None:
    """Several fp32 and int64 tensors of the logits' size."""
    if case.sizes["n"] * case.sizes["c"] > 2 * 10**8:
        raise AbsentError("its intermediate results take tens of gigabytes")


def _reference(case: Case, i: Inputs, mode: str) -> Arrays:
    x, target = i["inputs"].float().numpy(), i["labels"].numpy()
    weights = i["weights"].numpy() if "weights" in i else None
    loss, slope, total, _, _ = reference.ghm_loss(x, target, weights, bins=BINS)
    out = loss if case.option == "none" else loss.sum() / total
    grad = i["grad"].float().numpy() if "grad" in i else 1 / total
    return (out,) if mode == "fwd" else (out, slope * grad)


def _bytes(case: Case, mode: str, itemsize: int) -> int:
    n, c = case.sizes["n"], case.sizes["c"]
    # "none" writes the losses; its backward reads the logits again, and a gradient.
    logits = {"fwd": 2, "fwd+bwd": 3} if case.option != "none" else {"fwd": 3, "fwd+bwd": 6}
    labels = 3 if (case.option, mode) == ("none", "fwd+bwd") else 2
    per_row = (4 + 4) * c if case.option == "dense" else 8
    return logits[mode] * itemsize * n * c + labels * per_row * n


def _operations(case: Case, mode: str) -> int:
    return {"fwd": 31, "fwd+bwd": 35}[mode] * case.sizes["n"] * case.sizes["c"]


def _case(n: int) -> Case:
    return Case(f"{n}x80", {"n": n, "c": 80}, _SMALL, option="mean")


_WORK = Work(elements=lambda s: s["n"] * s["c"], block=lambda k: k["BLOCK"])
_LOOP = Work(elements=lambda s: s["n"] * s["c"], block=lambda k: k["BLOCK"], loop=True)
_ROWS = {"BLOCK": (512, 1024, 2048), "BLOCKS": (4, 8, 16), "num_warps": (1, 2, 4)}
_SETTINGS = {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
_SMALL = {"n": 512, "c": 80}

BENCH = Bench(
    name="ghm",
    cases=(
        Case("retinanet", {"n": 193_000, "c": 80}, _SMALL, option="mean"),  # 800 x 1333 pixels
        Case("retinanet-dense", {"n": 193_000, "c": 80}, _SMALL, option="dense"),
        Case("retinanet-none", {"n": 193_000, "c": 80}, _SMALL, option="none"),
        Case("retinanet-batch8", {"n": 1_500_000, "c": 80}, _SMALL, option="mean"),
        Case("objects365-batch8", {"n": 1_500_000, "c": 365}, {"n": 512, "c": 365}, option="mean"),
    ),
    small=tuple(map(_case, (2**10, 2**12, 2**14))),
    sweep=tuple(map(_case, (2**16, 2**18, 2**20))),
    make=make,
    providers={"ours": _ours, "eager": _eager, "compile": _compile, "mmdet": _mmdet},
    reference=_reference,
    bytes=_bytes,
    operations=_operations,
    settings={
        "ghm_count_rows": _ROWS,
        "ghm_loss_rows": _ROWS,
        "ghm_count": _SETTINGS,
        "ghm_loss": _SETTINGS,
        "ghm_bwd": _SETTINGS,
    },
    kernels={
        "ghm_count_rows_kernel": _LOOP,
        "ghm_loss_rows_kernel": _LOOP,
        "ghm_count_kernel": _WORK,
        "ghm_loss_kernel": _WORK,
        "ghm_bwd_kernel": _WORK,
        "scale_kernel": SCALE_WORK,
    },
    leaves=("inputs",),
)
