"""The losses that can train the digit detector's classes, and what each makes of its gradients.

A detector sees a few digits and very many easy background points. Plain cross-entropy adds up the
tiny gradients of all of those; focal loss and GHM weigh them down, each in its own way. The figure
follows figures 2 and 4 of Li et al., "Gradient Harmonized Single-stage Detector", AAAI 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from digits_scenes import CLASSES
from matplotlib.figure import Figure
from torch import Tensor, nn

from dlops_triton import ghmc_loss, sigmoid_focal_loss, softmax_focal_loss
from dlops_triton.nn import GHMC

NAMES = ("focal", "bce", "softmax-focal", "ghm")
BINS = 30  # of GHM, as in its authors' configuration


def outputs(name: str) -> int:
    """How many logits a point has: a softmax needs one for the background."""
    return CLASSES + (name == "softmax-focal")


def class_loss(name: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A loss of logits [B, P, outputs], labels [B, P] (CLASSES: background) and their count."""
    ghm = GHMC(bins=BINS, momentum=0.75).to(device)

    def focal(logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, labels, reduction="mean", avg_factor=count)

    def bce(logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, labels, None, 0, reduction="mean", avg_factor=count)

    def softmax_focal(logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        return softmax_focal_loss(logits.mT, labels, gamma=2.0, avg_factor=count)

    def harmonized(logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        return ghm(logits, labels, (labels >= 0).float())

    return dict(zip(NAMES, (focal, bce, softmax_focal, harmonized), strict=True))[name]


def probabilities(name: str, logits: Tensor) -> Tensor:
    """Of the digits, [B, P, CLASSES]."""
    if name == "softmax-focal":
        return logits.softmax(-1)[..., :CLASSES]
    return logits.sigmoid()


def plot_gradients(path: Path, name: str, logits: Tensor, labels: Tensor) -> None:
    """How many logits have which gradient norm, and how much each norm pulls under each loss.

    The norm is that of plain cross-entropy, g = |p - t|, of a detector trained with ``name``. What
    a loss makes of it is the sum of |dL/dx| over a bin, as a share of all bins.
    """
    if name == "softmax-focal":  # log odds of each digit against everything else
        p = probabilities(name, logits.detach()).clamp(1e-7, 1 - 1e-7)
        logits = torch.logit(p)
    counts = labels >= 0
    x = logits.detach().float()[counts].requires_grad_()
    labels = labels[counts]
    pulls = {
        "cross-entropy": sigmoid_focal_loss(x, labels, None, 0, reduction="sum"),
        "focal loss": sigmoid_focal_loss(x, labels, reduction="sum"),
        "GHM-C": ghmc_loss(x, labels, bins=BINS),
    }
    targets = nn.functional.one_hot(labels, CLASSES + 1)[:, :CLASSES]
    g = (x.detach().sigmoid() - targets).abs()
    bin_of = (g * BINS).long().clamp(max=BINS - 1).flatten()
    middle = (np.arange(BINS) + 0.5) / BINS

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = torch.bincount(bin_of, minlength=BINS).cpu().numpy()
    left.bar(middle, counts, width=0.9 / BINS, color="C0")
    left.set(
        yscale="log",
        ylim=(0.5, None),
        ylabel="logits",
        title=f"Held-out logits, trained with {name}",
    )
    for style, (loss, value) in zip(("-", "--", ":"), pulls.items(), strict=True):
        (dx,) = torch.autograd.grad(value, x)
        pull = torch.bincount(bin_of, dx.abs().flatten().double(), BINS).cpu().numpy()
        right.step(middle, pull / pull.sum(), where="mid", label=loss, linestyle=style)
    right.set(yscale="log", ylabel="share of all gradients", title="What each loss makes of them")
    right.legend()
    for ax in (left, right):
        ax.set(xlabel="gradient norm g of cross-entropy", xlim=(0, 1))
        ax.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
