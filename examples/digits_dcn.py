"""The deformable layer of the detector: where it looks, and what it is worth.

A plain 3 x 3 convolution looks at a point and at its eight neighbours. A deformable one (Dai et
al., "Deformable Convolutional Networks", ICCV 2017) computes for every point where to look instead,
and with a mask (Zhu et al., "Deformable ConvNets v2", CVPR 2019) how much of it to take. The
picture follows figure 6 of the former.
"""

from pathlib import Path

import numpy as np
import torch
from digits_network import STRIDE, Detector
from digits_pictures import LEGEND, draw, show
from digits_scenes import CLASSES, SIZE, Scenes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from dlops_triton.nn import ModulatedDeformConv2dPack

LAYERS = ("plain", "deformable")
UNIT, TAP, PLAIN, DIGIT = "#39ff6a", "#ff3b30", "#ffe14d", "#ffffff"
MIN_WINDOW = 28  # pixels, the side of what is shown around the smallest digits


@torch.inference_mode()
def looks(model: Detector, images: Tensor) -> tuple[Tensor, Tensor]:
    """Where the taps of each unit look, [N, H, W, 9, 2] xy in pixels, and their masks."""
    seen: list[Tensor] = []
    layer = next(m for m in model.modules() if isinstance(m, ModulatedDeformConv2dPack))
    hook = layer.conv_offset.register_forward_hook(lambda *call: seen.append(call[2]))
    model.eval()(images)
    hook.remove()
    offsets, masks = seen[0].split((18, 9), dim=1)
    shifts = offsets.unflatten(1, (9, 2)).permute(0, 3, 4, 1, 2).flip(-1)
    return regular(shifts.device) + STRIDE * shifts, masks.sigmoid().movedim(1, -1)


def regular(device: torch.device) -> Tensor:
    """Where the taps of a plain convolution look, [H, W, 9, 2]."""
    ticks, steps = torch.arange(SIZE // STRIDE, device=device), torch.arange(-1, 2, device=device)
    units, taps = (torch.cartesian_prod(t, t).flip(1) for t in (ticks, steps))
    return (STRIDE * (units[:, None] + taps + 0.5)).unflatten(0, (len(ticks), len(ticks)))


def plot_sampling(path: Path, model: Detector, scenes: Scenes) -> None:
    """Draw where units in the middle of digits look: four large digits, and four small ones."""
    scenes = Scenes(*(t[:8] for t in scenes))
    taps, masks = looks(model, scenes.images)
    plain = regular(taps.device)
    figure = Figure(figsize=(16, 9.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    for i, ax in enumerate(figure.subplots(2, 4).flat):
        real = scenes.labels[i] < CLASSES
        boxes, labels = scenes.boxes[i, real], scenes.labels[i, real]
        tall = boxes[:, 3] - boxes[:, 1]
        digit = int(tall.argmax() if i < 4 else tall.argmin())
        corners = boxes[digit].view(2, 2)
        centre, window = corners.mean(0), 1.6 * float(corners.diff(dim=0).max())
        window = min(max(window, MIN_WINDOW), SIZE)
        x, y = (centre // STRIDE).long().tolist()
        show(ax, scenes, i)
        draw(ax, boxes[digit].tolist(), DIGIT, "--")
        sampling(ax, taps[i, y, x], masks[i, y, x], plain[y, x])
        left, top = (centre - window / 2).clamp(0, SIZE - window).tolist()
        ax.set(xlim=(left - 0.5, left + window - 0.5), ylim=(top + window - 0.5, top - 0.5))
        ax.set_title(f"{labels[digit]}, {tall[digit]:.0f} pixels tall")
    marks = {
        "the unit": {"marker": "s", "mfc": "none", "mec": UNIT, "mew": 2},
        "its taps, larger: more weight": {"marker": "o", "mec": "white", "color": TAP},
        "taps of a plain layer": {"marker": "+", "mew": 2, "color": PLAIN},
        "the digit": {"linestyle": "--", "color": DIGIT},
    }
    point = {"linestyle": "", "markersize": 10}
    keys = [Line2D([], [], label=name, **(point | mark)) for name, mark in marks.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, **LEGEND)
    figure.suptitle("Where the deformable layer looks, in held-out scenes")
    figure.savefig(path, dpi=120)


def sampling(ax: Axes, taps: Tensor, masks: Tensor, plain: Tensor) -> None:
    """Draw one unit, its taps [9, 2], as large as their masks [9], and those of a plain layer."""
    # The picture has the first pixel's centre at 0.
    taps, plain = (t.cpu().numpy() - 0.5 for t in (taps, plain))
    ax.plot(*np.stack([plain, taps]).transpose(2, 0, 1), color=TAP, lw=1, alpha=0.6)
    ax.scatter(*plain.T, marker="+", s=60, lw=1.8, color=PLAIN)
    ax.scatter(*taps.T, s=160 * masks.cpu().numpy(), color=TAP, edgecolor="white", zorder=3)
    cell = plain[4] - STRIDE / 2
    ax.add_patch(Rectangle(cell, STRIDE, STRIDE, fill=False, edgecolor=UNIT, linewidth=2.2))


def verdict(plain: float, deformable: float) -> str:
    """The AP of the two layers, in words."""
    ahead = deformable - plain
    if abs(ahead) < 0.005:
        return "Hardly a difference: the two layers are within 0.005 AP of each other."
    if ahead < 0:
        return f"The deformable layer does not win here: it is {-ahead:.3f} AP behind."
    return f"The deformable layer wins here: it is {ahead:.3f} AP ahead."
