"""Drawings of the documentation, computed by the library itself whenever the site is built.

python docs/pictures.py FOLDER    writes them as SVG files
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dlops_triton as ops
from dlops_triton.perf.ink import Ink, Picture, svg

COLOURS = ("measured0", "measured1", "measured2", "predicted1", "soft", "measured5")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))


def _axes(figure: Any, ink: Ink, titles: Sequence[tuple[str, str, str]]) -> list[Any]:
    """Axes side by side, each with its title and what its two directions are."""
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.97))
    found = list(figure.subplots(1, len(titles), squeeze=False)[0])
    for axes, (title, x, y) in zip(found, titles, strict=True):
        axes.set_title(title, size=9.5, color=ink["ink"], loc="left")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
    return found


def _curves(
    axes: Any, ink: Ink, x: Tensor, curves: dict[str, Tensor], legend: str = "best"
) -> None:
    for i, (name, y) in enumerate(curves.items()):
        axes.plot(x, y, color=ink[COLOURS[i]], linestyle=DASHES[i], linewidth=1.7, label=name)
    axes.legend(frameon=False, loc=legend, fontsize=8, handlelength=2.6)


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _plane(axes: Any) -> None:
    """A picture's: pixels are square, y points down, nothing else is of interest."""
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _box(axes: Any, box: Sequence[float], **style: Any) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **({"fill": False} | style)))


def _slope(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


# --- losses ----------------------------------------------------------------------------------

GAMMAS = (0, 0.5, 1, 2, 5)


def focal(figure: Any, ink: Ink) -> None:
    one, two, three = _axes(
        figure,
        ink,
        [
            ("Loss", "probability of the truth", "loss"),
            ("Gradient by the logit", "probability of the truth", "size of the gradient"),
            ("A background logit", "logit", "loss, gamma 2"),
        ],
    )
    p = torch.linspace(0.01, 0.99, 99)
    x, truth = p.logit(), torch.ones(99)

    def loss(x: Tensor, gamma: float) -> Tensor:
        return ops.sigmoid_focal_loss(x, truth, alpha=None, gamma=gamma)

    _curves(one, ink, p, {f"gamma {g}": loss(x, g) for g in GAMMAS})
    slopes = {f"gamma {g}": _slope(partial(loss, gamma=g), x).abs() for g in GAMMAS}
    _curves(two, ink, p, slopes)
    one.set_ylim(0, 4)
    x = torch.linspace(0, 40, 401)
    tiny = torch.finfo(torch.float32).tiny
    clamped = -0.75 * x.sigmoid() ** 2 * (1 - x.sigmoid()).clamp(min=tiny).log()
    here = ops.sigmoid_focal_loss(x, torch.zeros(401))
    _curves(three, ink, x, {"here": here, "clamped": clamped}, "center right")
    three.set_ylim(0, 80)


def softmax_focal(figure: Any, ink: Ink) -> None:
    one, two = _axes(
        figure,
        ink,
        [
            ("Gradient by the logit of the truth", "its probability", "size of the gradient"),
            ("A certain answer, gamma 2", "lead of the true class, in logits", "loss"),
        ],
    )
    p = torch.linspace(0.01, 0.99, 99)
    lead, labels = p.logit(), torch.zeros(99, dtype=torch.long)

    def loss(x: Tensor, gamma: float) -> Tensor:
        rows = torch.stack([x, torch.zeros_like(x)], 1)
        return ops.softmax_focal_loss(rows, labels[:1].expand(len(x)), None, gamma, "none")

    slopes = {f"gamma {g}": _slope(partial(loss, gamma=g), lead).abs() for g in GAMMAS}
    _curves(one, ink, p, slopes)
    x = torch.linspace(0, 20, 301)
    log_p = F.log_softmax(torch.stack([x, torch.zeros_like(x)], 1), 1)[:, 0]
    plain = (1 - log_p.exp()) ** 2 * -log_p
    here = loss(x, 2)
    plain[plain == 0] = torch.nan
    _curves(two, ink, x, {"here": here, "(1 - exp(log p))² log p, fp32": plain})
    _logarithmic(two)
    two.set_ylim(1e-27, 10)


def ghm(figure: Any, ink: Ink) -> None:
    names = ("Examples", "Weight of each", "Share of gradient")
    one, two, three = _axes(figure, ink, [(name, "gradient norm |p - t|", "") for name in names])
    random = torch.Generator().manual_seed(0)
    # A detector's: mostly easy background, some doubtful, some outliers.
    parts = [(-5.0, 1.2, 9000), (0.0, 1.5, 800), (4.5, 1.0, 200)]
    x = torch.cat([m + s * torch.randn(n, generator=random) for m, s, n in parts])[:, None]
    t, bins = torch.zeros_like(x), 10
    g = x.sigmoid()
    weight = ops.ghmc_loss(x, t, bins=bins, reduction="none") / F.softplus(x)
    edges = torch.arange(bins + 1) / bins
    place = (g * bins).long().clamp(max=bins - 1)
    centre, width = edges[:-1] + 0.05, 0.09
    inside = [place == i for i in range(bins)]
    count = torch.stack([i.sum() for i in inside])
    one.bar(centre, count, width, color=ink["measured0"])
    _logarithmic(one)
    weights = torch.stack([weight[i].mean() for i in inside])
    two.bar(centre, weights, width, color=ink["measured2"])
    _logarithmic(two)
    shares = [torch.stack([w[i].sum() for i in inside]) for w in (g, g * weight)]
    for share, shift, name in zip(shares, (-0.022, 0.022), ("cross-entropy", "GHM-C"), strict=True):
        three.bar(
            centre + shift, share / share.sum(), 0.042, label=name,
            color=ink["peer" if shift < 0 else "measured0"],
        )  # fmt: skip
    three.legend(frameon=False, fontsize=8)


# --- boxes -----------------------------------------------------------------------------------

TRUTH = torch.tensor([[0.0, 0, 10, 10]])


def _moved(steps: int = 251) -> tuple[Tensor, Tensor]:
    shift = torch.linspace(-25, 25, steps)
    boxes = TRUTH.repeat(steps, 1)
    boxes[:, ::2] += shift[:, None]
    return shift, boxes


def _shaped(steps: int = 99) -> tuple[Tensor, Tensor]:
    """Of one area and one centre, ever wider."""
    aspect = torch.logspace(-3, 3, steps, base=2)
    half = torch.stack([5 * aspect.sqrt(), 5 / aspect.sqrt()], 1)
    return aspect, torch.cat([5 - half, 5 + half], 1)


def iou(figure: Any, ink: Ink) -> None:
    one, two = _axes(
        figure,
        ink,
        [
            ("A box that moves past another of its size", "shift, in tenths of its side", "value"),
            ("A box in place, of the same area", "width over height", "value"),
        ],
    )
    functions = {
        "IoU": ops.box_iou,
        "GIoU": ops.generalized_box_iou,
        "DIoU": ops.distance_box_iou,
        "CIoU": ops.complete_box_iou,
    }
    for axes, (x, boxes) in ((one, _moved()), (two, _shaped())):
        _curves(axes, ink, x, {name: f(boxes, TRUTH)[:, 0] for name, f in functions.items()})
    two.set_xscale("log", base=2)
    two.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])


def iou_loss(figure: Any, ink: Ink) -> None:
    one, two = _axes(
        figure,
        ink,
        [
            ("Loss of a box that moves away", "shift, in tenths of its side", "loss"),
            ("Pull on its position", "shift, in tenths of its side", "gradient, as a sum over x"),
        ],
    )
    shift, boxes = _moved()
    shift, boxes = shift[125:], boxes[125:]
    truth = TRUTH.expand(len(boxes), 4)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "1 - IoU": lambda b: 1 - ops.box_iou(b[:, None], truth[:, None])[:, 0, 0],
        "GIoU": lambda b: ops.generalized_box_iou_loss(b, truth),
        "DIoU": lambda b: ops.distance_box_iou_loss(b, truth),
        "CIoU": lambda b: ops.complete_box_iou_loss(b, truth),
    }
    _curves(one, ink, shift, {name: f(boxes) for name, f in losses.items()})
    inner = shift[1:]  # at 0 all have a kink
    pulls = {name: _slope(f, boxes)[1:, ::2].sum(1) for name, f in losses.items()}
    _curves(two, ink, inner, pulls)


def match(figure: Any, ink: Ink) -> None:
    (axes,) = _axes(figure, ink, [("What box_match makes of a grid of anchors", "", "")])
    objects = torch.tensor([[26.0, 22, 74, 66], [104, 40, 136, 60]])
    y, x = torch.meshgrid(torch.arange(4.0, 92, 8), torch.arange(4.0, 168, 8), indexing="ij")
    centre = torch.stack([x, y], -1).reshape(-1, 2)
    anchors = torch.cat([centre - 20, centre + 20], 1)
    matched, _ = ops.box_match(anchors, objects, pos_iou=0.5, neg_iou=0.4, min_pos_iou=0.2)
    kinds = [
        ("background, -1", matched == -1, "peer", ".", 14),
        ("ignored, -2", matched == -2, "measured1", "x", 26),
        ("the left object's, 0", matched == 0, "measured0", "o", 34),
        ("the right object's, 1, by low quality", matched == 1, "predicted1", "s", 30),
    ]
    for box, colour in zip(objects.tolist(), ("measured0", "predicted1"), strict=True):
        _box(axes, box, edgecolor=ink[colour], linewidth=2)
    for i, colour in ((0, "measured0"), (1, "predicted1")):
        anchor = anchors[matched == i][0].tolist()
        _box(axes, anchor, edgecolor=ink[colour], linewidth=1, linestyle=":")
    for name, members, colour, marker, size in kinds:
        at = centre[members].T
        axes.scatter(*at, size, color=ink[colour], marker=marker, linewidth=1.2, label=name)
    _plane(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)


def _crowd() -> tuple[Tensor, Tensor]:
    """What a detector says of three things, two of them close together."""
    random = torch.Generator().manual_seed(3)
    things = torch.tensor([[10.0, 14, 44, 70], [58, 20, 92, 76], [72, 24, 106, 80]])
    found = things.repeat_interleave(4, 0) + 3.2 * torch.randn(12, 4, generator=random)
    return found, 0.35 + 0.6 * torch.rand(12, generator=random)


def nms(figure: Any, ink: Ink) -> None:
    boxes, scores = _crowd()
    kept = ops.nms(boxes, scores, 0.5)
    names = [
        ("Twelve boxes, thicker for a higher score", "", ""),
        (f"nms(boxes, scores, 0.5): {len(kept)} of them", "", ""),
    ]
    for axes, (_, members) in zip(
        _axes(figure, ink, names), (("all", torch.arange(12)), ("kept", kept)), strict=True
    ):
        for i in members.tolist():
            colour = "measured0" if i in kept else "peer"
            _box(
                axes, boxes[i].tolist(), edgecolor=ink[colour], linewidth=0.5 + 2.6 * scores[i] ** 2
            )
        for i in kept.tolist():
            x, y = boxes[i, :2].tolist()
            axes.text(x, y - 1.5, f"{scores[i]:.2f}", size=8, color=ink["measured0"], va="bottom")
        axes.set_xlim(0, 116)
        axes.set_ylim(6, 88)
        _plane(axes)


def soft_nms(figure: Any, ink: Ink) -> None:
    one, two = _axes(
        figure,
        ink,
        [
            ("What is left of a score", "IoU with a better box", "factor"),
            ("Twelve boxes, by their rank", "rank", "score"),
        ],
    )
    overlap = torch.linspace(0, 0.999, 334)

    def factor(**options: Any) -> Tensor:
        left = torch.zeros(len(overlap))
        for i, wanted in enumerate(overlap):
            pair = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, wanted]])  # one within the other
            _, scores = ops.soft_nms(pair, torch.ones(2), score_threshold=0, **options)
            left[i] = scores[1] if len(scores) > 1 else 0
        return left

    curves = {
        "gaussian, sigma 0.3": factor(sigma=0.3),
        "gaussian, sigma 0.5": factor(sigma=0.5),
        "linear, above 0.3": factor(method="linear", iou_threshold=0.3),
        "hard, above 0.5": factor(method="hard", iou_threshold=0.5),
    }
    _curves(one, ink, overlap, curves, "upper right")
    boxes, scores = _crowd()
    before = scores.sort(descending=True).values
    _, after = ops.soft_nms(boxes, scores, sigma=0.5)
    kept = scores[ops.nms(boxes, scores, 0.5)]
    for name, values, colour, mark in (
        ("before", before, "peer", "o--"), ("gaussian, sigma 0.5", after, "measured1", "s-"),
        ("nms, 0.5", kept, "predicted1", "^-"),
    ):  # fmt: skip
        two.plot(range(1, len(values) + 1), values, mark, color=ink[colour], label=name, ms=4)
    two.set_ylim(0, 1)
    two.legend(frameon=False, fontsize=8)


def deform(figure: Any, ink: Ink) -> None:
    """A 3 x 3 kernel on an arc: nine taps in place, and moved onto it."""
    size = 13
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = ((y - 14.0) ** 2 + (x - 6.0) ** 2).sqrt()
    image = (1.15 - (distance - 8.5).abs() / 1.3).clamp(0, 1)[None, None]
    taps = torch.stack(torch.meshgrid(*[torch.arange(-1, 2.0)] * 2, indexing="ij"), -1) + 6
    wanted = torch.empty(3, 3, 2)
    for row, radius in enumerate((9.0, 8.5, 8.0)):
        for column, angle in enumerate((-0.42, 0.0, 0.42)):
            turn = torch.tensor(angle)
            wanted[row, column] = torch.stack([14 - radius * turn.cos(), 6 + radius * turn.sin()])
    offset = torch.zeros(1, 18, size, size)
    offset[0, :, 6, 6] = (wanted - taps).reshape(-1)
    at = 6 * size + 6
    seen = [
        ops.deform_sample(image, moved, 3, padding=1)[0, :, at] for moved in (0 * offset, offset)
    ]
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.97))
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    for axes, title, values in (
        (left, "Pixels, and where nine taps look", image[0, 0]),
        (middle, "Plain taps see", seen[0].view(3, 3)),
        (right, "Moved taps see", seen[1].view(3, 3)),
    ):
        axes.set_title(title, size=9.5, color=ink["ink"], loc="left")
        for (i, j), value in zip(
            torch.ones_like(values).nonzero().tolist(), values.flatten(), strict=True
        ):
            square = {"fill": True, "facecolor": ink["measured0"], "alpha": float(value) * 0.75}
            _box(axes, (j - 0.47, i - 0.47, j + 0.47, i + 0.47), **square)
            if axes is not left:
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", size=8, color=ink["ink"])
        axes.set_xlim(-0.6, values.shape[1] - 0.4)
        axes.set_ylim(*((2.4, 9.6) if axes is left else (-0.6, 2.6)))
        _plane(axes)
    for start, end in zip(taps.reshape(-1, 2), wanted.reshape(-1, 2), strict=True):
        left.plot(*torch.stack([start, end]).flip(1).T, color=ink["soft"], linewidth=0.9)
    left.scatter(*taps.reshape(-1, 2).flip(1).T, 18, color=ink["soft"], marker="s", label="plain")
    left.scatter(
        *wanted.reshape(-1, 2).flip(1).T, 30, color=ink["alert"], label="moved by the offset"
    )
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _picture(name: str, height: float, build: Callable[[Any, Ink], None], title: str) -> Picture:
    return Picture(name, title, "Computed by dlops_triton", height, build, 7.6, headed=False)


PICTURES = [
    _picture("focal", 2.7, focal, "Focal loss"),
    _picture("softmax_focal", 2.9, softmax_focal, "Softmax focal loss"),
    _picture("ghm", 2.6, ghm, "GHM"),
    _picture("iou", 2.9, iou, "IoU and its kin"),
    _picture("iou_loss", 2.9, iou_loss, "Box losses"),
    _picture("match", 4.1, match, "Matching"),
    _picture("nms", 2.9, nms, "NMS"),
    _picture("soft_nms", 2.9, soft_nms, "Soft-NMS"),
    _picture("deform", 2.7, deform, "Deformable sampling"),
]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        (folder / f"{picture.name}.svg").write_text(svg(picture), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
