"""The pictures of the digit detector: its losses, what it finds, and what each NMS leaves."""

from pathlib import Path

import numpy as np
import torch
from digits_nms import Detections
from digits_scenes import CLASSES, Scenes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from dlops_triton import box_iou


def match(found: Detections, boxes: Tensor, labels: Tensor) -> tuple[list[bool], list[bool]]:
    """Which detections of a scene are right, and which of its digits are found.

    A detection, the surest first, is right about a digit of its class that it covers with an IoU of
    at least 0.5 and that no surer one has taken.
    """
    iou = box_iou(found.boxes, boxes) * (found.labels[:, None] == labels)
    right, taken = [], torch.zeros_like(labels, dtype=torch.bool)
    for row in iou:
        best, digit = row.masked_fill(taken, 0).max(0)
        right.append(bool(best >= 0.5))
        taken[digit] |= best >= 0.5
    return right, taken.tolist()


RIGHT, WRONG, FOUND, MISSED = "#4cc9ff", "#ff6b4a", "#ffffff", "#ffe14d"
LEGEND = {"facecolor": "#444444", "labelcolor": "white", "handlelength": 3}
MIN_SCORE = 0.4  # of a detection that is drawn


def plot_detections(path: Path, found: Detections, scenes: Scenes) -> None:
    """Draw the first eight scenes, with what was found in them and what is there."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    for i, ax in enumerate(figure.subplots(2, 4).flat):
        _, taken = panel(ax, scenes, i, found.of(i, MIN_SCORE))
        ax.set_title(f"{sum(taken)} of {len(taken)} digits found")
    finish(figure, f"Held-out scenes, detections with a score above {MIN_SCORE}", path)


def plot_crowded(path: Path, found: dict[str, Detections], scenes: Scenes) -> None:
    """Draw the scene in which most hangs on the NMS: the digits there, and what each NMS leaves.

    Soft-NMS lowers scores, so that no score is fair to all: of each as many detections count as
    there are digits, the surest ones.
    """

    def surest(nms: str, scene: int) -> Detections:
        digits = int((scenes.labels[scene] < CLASSES).sum())
        return Detections(*(t[:digits] for t in found[nms].of(scene)))

    def hits(nms: str, scene: int) -> int:
        real = scenes.labels[scene] < CLASSES
        truth = scenes.boxes[scene, real], scenes.labels[scene, real]
        return sum(match(surest(nms, scene), *truth)[1])

    scene = max(range(len(scenes.images)), key=lambda i: np.ptp([hits(nms, i) for nms in found]))
    figure = Figure(figsize=(16, 4.9), layout="constrained")
    truth, *axes = figure.subplots(1, 1 + len(found))
    boxes = scenes.boxes[scene, scenes.labels[scene] < CLASSES].tolist()
    show(truth, scenes, scene)
    truth.set_title(f"the {len(boxes)} digits there are")
    for box in boxes:
        draw(truth, box, FOUND, "--")
    for nms, ax in zip(found, axes, strict=True):
        right, _ = panel(ax, scenes, scene, surest(nms, scene))
        ax.set_title(f"{nms}: {sum(right)} right")
    finish(figure, f"Where NMS matters most: of each its {len(boxes)} surest detections", path)


def show(ax: Axes, scenes: Scenes, scene: int) -> None:
    ax.imshow(scenes.images[scene].permute(1, 2, 0).cpu().numpy(), interpolation="bicubic")
    ax.set(xticks=[], yticks=[])


def panel(ax: Axes, scenes: Scenes, scene: int, here: Detections) -> tuple[list[bool], list[bool]]:
    """Draw a scene with the detections `here`; return what `match` says of them."""
    real = scenes.labels[scene] < CLASSES
    boxes = scenes.boxes[scene, real]
    right, taken = match(here, boxes, scenes.labels[scene, real])
    show(ax, scenes, scene)
    for box, hit in zip(boxes.tolist(), taken, strict=True):
        draw(ax, box, FOUND if hit else MISSED, "--")
    for box, score, label, ok in zip(*(t.tolist() for t in here[1:]), right, strict=True):
        colour = RIGHT if ok else WRONG
        draw(ax, box, colour, "-")
        chip = {"facecolor": colour, "edgecolor": "none", "alpha": 0.8, "pad": 0.7}
        ax.text(box[0], max(box[1] - 1.5, 4), f"{label} {score:.2f}", fontsize=7, bbox=chip)
    return right, taken


def finish(figure: Figure, title: str, path: Path) -> None:
    names = {
        "detection, right": (RIGHT, "-"),
        "detection, wrong or a duplicate": (WRONG, "-"),
        "ground truth, found": (FOUND, "--"),
        "ground truth, missed": (MISSED, "--"),
    }
    keys = [Line2D([], [], color=c, ls=style, label=name) for name, (c, style) in names.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, **LEGEND)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw(ax: Axes, box: list[float], colour: str, style: str) -> None:
    # A box begins at 0 where the first pixel begins; the picture has that pixel's centre at 0.
    x1, y1, x2, y2 = (side - 0.5 for side in box)
    patch = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=style)
    if style == "-":
        patch.set(linewidth=1.6, path_effects=[withStroke(linewidth=3, foreground="#00000080")])
    ax.add_patch(patch)


def plot_losses(path: Path, name: str, losses: list[tuple[float, float]]) -> None:
    window = max(1, len(losses) // 40)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    names = (f"classes: {name}", "boxes: GIoU")
    for name, values, colour in zip(names, np.transpose(losses), ("C0", "C1"), strict=True):
        ax.plot(values, color=colour, alpha=0.25, linewidth=0.7)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        ax.plot(np.arange(len(smooth)) + window / 2, smooth, color=colour, label=name)
    ax.set(yscale="log", xlabel="step", ylabel="loss", title="Training loss")
    ax.grid(alpha=0.3, which="both")
    ax.legend(title=f"bold: mean of {window} steps")
    figure.savefig(path, dpi=120)
