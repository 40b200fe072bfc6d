"""Train a small detector of handwritten digits with dlops_triton, and see what it finds.

    python examples/digits_detector.py            # about 2 minutes on two CPU cores
    python examples/digits_detector.py --quick    # half a minute, and a weaker detector
    python examples/digits_detector.py --loss all # one detector with each loss, compared

An anchor-free, FCOS-like network: every fourth pixel, both ways, says which digit is centred there
and how far its box extends. `--loss` says what trains the classes, by default `sigmoid_focal_loss`;
`batched_nms` removes the duplicates, `box_iou` tells hits from misses in the picture, and
pycocotools' COCOeval judges the result, on writers and on parts of the photographs that the network
has never seen. Ctrl-C ends the training early; what was learnt so far is saved and evaluated.
"""

import argparse
import contextlib
import io
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
from digits_losses import NAMES, class_loss, outputs, plot_gradients, probabilities
from digits_scenes import CLASSES, SIZE, Scenes, compose
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from tqdm import tqdm

import dlops_triton
from dlops_triton import batched_nms, box_iou, ghmc_loss, sigmoid_focal_loss, softmax_focal_loss

OPS = (sigmoid_focal_loss, softmax_focal_loss, ghmc_loss, batched_nms, box_iou)
STRIDE = 4  # pixels from one point of prediction to the next
BATCH = 4
# A bar that redraws itself in a terminal, and a line now and then in a log file.
BAR = {"mininterval": 0.2 if sys.stderr.isatty() else 10, "ncols": 88}


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Detector(nn.Module):
    """From images [B, 3, SIZE, SIZE] to class logits [B, P, C] and boxes [B, P, 4].

    C is CLASSES, or one more if ``loss`` is a softmax's.
    """

    def __init__(self, loss: str = "focal", width: int = 48):
        super().__init__()
        self.loss = loss
        self.stem = nn.Sequential(conv(3, width // 2, 2), conv(width // 2, width, 2))
        self.fine = Residual(width)
        self.coarse = nn.Sequential(
            conv(width, 2 * width, 2),
            Residual(2 * width),
            Residual(2 * width),
            nn.Conv2d(2 * width, width, 1),
            nn.Upsample(scale_factor=2),
        )
        self.mix = Residual(width)
        self.classes = nn.Sequential(
            conv(width, width), nn.Conv2d(width, outputs(loss), 3, padding=1)
        )
        self.sides = nn.Sequential(conv(width, width), nn.Conv2d(width, 4, 3, padding=1))
        # To begin with, every point is 1 % sure of every digit, each 20 pixels wide and tall.
        nn.init.constant_(self.classes[-1].bias, -math.log(99))
        if outputs(loss) > CLASSES:
            nn.init.zeros_(self.classes[-1].bias[CLASSES:])
        nn.init.constant_(self.sides[-1].bias, math.log(10))
        ticks = STRIDE * (torch.arange(SIZE // STRIDE) + 0.5)
        self.register_buffer("points", torch.cartesian_prod(ticks, ticks).flip(1))  # [P, 2], xy
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        x = self.fine(self.stem(x))
        x = self.mix(x + self.coarse(x))
        logits, sides = (head(x).flatten(2).mT for head in (self.classes, self.sides))
        left_top, right_bottom = sides.clamp(max=5).exp().chunk(2, dim=2)
        return logits, torch.cat([self.points - left_top, self.points + right_bottom], dim=2)


def assign(points: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give every point the class [B, P] and box [B, P, 4] it should predict.

    A digit belongs to the points inside its box and within one stride of its centre, both ways;
    where digits compete, to the smaller one. The other points are background, class CLASSES.
    """
    low = points[:, None] - boxes[:, None, :, :2]  # [B, P, MAX_DIGITS, 2]
    high = boxes[:, None, :, 2:] - points[:, None]
    inside = torch.minimum(low, high).amin(3) > 0
    central = (low - high).abs().amax(3) < 2 * STRIDE
    area = (boxes[..., 2:] - boxes[..., :2]).prod(2)[:, None]
    area, owner = torch.where(inside & central, area, torch.inf).min(2)
    classes = labels.gather(1, owner).masked_fill(area.isinf(), CLASSES)
    return classes, boxes.take_along_dim(owner[..., None], dim=1)


def box_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - IoU of paired boxes. A point inside both makes sure that they overlap."""
    low = torch.maximum(predicted[:, :2], wanted[:, :2])
    high = torch.minimum(predicted[:, 2:], wanted[:, 2:])
    both = (high - low).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (predicted, wanted)]
    return 1 - both / (areas[0] + areas[1] - both)


def train(model: Detector, scenes: Scenes, steps: int, seed: int) -> list[tuple[float, float]]:
    """Train `model` in place; return the two losses of every step. Ctrl-C ends it early."""
    of_classes = class_loss(model.loss, model.points.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.2)
    shuffle = torch.Generator().manual_seed(seed)
    device = scenes.images.device
    losses: list[tuple[float, float]] = []
    model.train()
    with (
        contextlib.suppress(KeyboardInterrupt),
        tqdm(range(steps), f"training, {model.loss}", unit="step", **BAR) as bar,
    ):
        for _ in bar:
            batch = torch.randint(len(scenes.images), (BATCH,), generator=shuffle).to(device)
            images, boxes, labels = (t[batch] for t in scenes)
            logits, predicted = model(images)
            classes, wanted = assign(model.points, boxes, labels)
            digit = classes < CLASSES
            count = digit.sum()
            ours = of_classes(logits, classes, count)
            iou = box_loss(predicted[digit], wanted[digit]).mean()
            optimizer.zero_grad()
            (ours + iou / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
            schedule.step()
            losses.append((ours.item(), iou.item()))
            bar.set_postfix(loss=f"{np.mean(losses[-50:], axis=0).sum():.3f}", refresh=False)
    return losses


class Detections(NamedTuple):
    scene: Tensor  # [K] int64
    boxes: Tensor  # [K, 4] xyxy
    scores: Tensor  # [K], descending within a scene
    labels: Tensor  # [K] int64

    def of(self, scene: int, min_score: float = 0) -> "Detections":
        chosen = (self.scene == scene) & (self.scores > min_score)
        return Detections(*(t[chosen] for t in self))


@torch.inference_mode()
def detect(model: Detector, images: Tensor, candidates: int = 100) -> Detections:
    """Find the digits in `images` [N, 3, SIZE, SIZE]."""
    model.eval()
    found = []
    for first in range(0, len(images), 20):
        logits, boxes = model(images[first : first + 20])
        scores, best = (
            probabilities(model.loss, logits).flatten(1).topk(candidates)
        )  # [B, candidates]
        point, label = best // CLASSES, best % CLASSES
        boxes = boxes.take_along_dim(point[..., None], dim=1).clamp(0, SIZE)
        scene = torch.arange(len(scores), device=scores.device)[:, None].expand_as(label)
        scene, label, scores, boxes = (t.flatten(0, 1) for t in (scene, label, scores, boxes))
        # One call for all scenes and classes: boxes compete within their scene and class only.
        kept = batched_nms(boxes, scores, scene * CLASSES + label, 0.5, score_threshold=0.02)
        found.append((scene[kept] + first, boxes[kept], scores[kept], label[kept]))
    return Detections(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def evaluate(found: Detections, scenes: Scenes) -> dict[str, float]:
    """COCO's average precision: over IoU 0.50 to 0.95, at 0.50 and at 0.75."""
    names = ("AP", "AP50", "AP75")
    if not len(found.scene):
        return dict.fromkeys(names, 0.0)
    real = scenes.labels < CLASSES
    digits = (real.nonzero()[:, 0], scenes.labels[real], xywh(scenes.boxes[real]))
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(scenes.images))],
        "categories": [{"id": c} for c in range(CLASSES)],
        "annotations": [
            {
                "id": i + 1,  # COCOeval takes 0 for "no match"
                "image_id": scene,
                "category_id": label,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (scene, label, box) in enumerate(zip(*(t.tolist() for t in digits), strict=True))
        ],
    }
    scene, scores, labels = (t[:, None] for t in (found.scene, found.scores, found.labels))
    results = torch.cat([scene, xywh(found.boxes), scores, labels], dim=1).double().cpu().numpy()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        coco = COCOeval(truth, truth.loadRes(results), "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    return {name: round(float(value), 4) for name, value in zip(names, coco.stats, strict=False)}


def xywh(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


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


def plot_detections(path: Path, found: Detections, scenes: Scenes, min_score: float = 0.4) -> None:
    """Draw the first eight scenes, with what was found in them and what is there."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    for i, ax in enumerate(figure.subplots(2, 4).flat):
        here = found.of(i, min_score)
        real = scenes.labels[i] < CLASSES
        boxes = scenes.boxes[i, real]
        right, taken = match(here, boxes, scenes.labels[i, real])
        ax.imshow(scenes.images[i].permute(1, 2, 0).cpu().numpy(), interpolation="bicubic")
        ax.set(xticks=[], yticks=[], title=f"{sum(taken)} of {len(taken)} digits found")
        for box, hit in zip(boxes.tolist(), taken, strict=True):
            draw(ax, box, FOUND if hit else MISSED, "--")
        for box, score, label, ok in zip(*(t.tolist() for t in here[1:]), right, strict=True):
            colour = RIGHT if ok else WRONG
            draw(ax, box, colour, "-")
            chip = {"facecolor": colour, "edgecolor": "none", "alpha": 0.8, "pad": 0.7}
            ax.text(box[0], max(box[1] - 1.5, 4), f"{label} {score:.2f}", fontsize=7, bbox=chip)
    names = {
        "detection, right": (RIGHT, "-"),
        "detection, wrong or a duplicate": (WRONG, "-"),
        "ground truth, found": (FOUND, "--"),
        "ground truth, missed": (MISSED, "--"),
    }
    keys = [Line2D([], [], color=c, ls=style, label=name) for name, (c, style) in names.items()]
    style = {"facecolor": "#444444", "labelcolor": "white", "handlelength": 3}
    figure.legend(handles=keys, loc="outside lower center", ncols=4, **style)
    figure.suptitle(f"Held-out scenes, detections with a score above {min_score}")
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
    names = (f"classes: {name}", "boxes: 1 - IoU")
    for name, values, colour in zip(names, np.transpose(losses), ("C0", "C1"), strict=True):
        ax.plot(values, color=colour, alpha=0.25, linewidth=0.7)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        ax.plot(np.arange(len(smooth)) + window / 2, smooth, color=colour, label=name)
    ax.set(yscale="log", xlabel="step", ylabel="loss", title="Training loss")
    ax.grid(alpha=0.3, which="both")
    ax.legend(title=f"bold: mean of {window} steps")
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loss", choices=(*NAMES, "all"), default="focal", help="of the classes")
    parser.add_argument("--quick", action="store_true", help="fewer steps and fewer scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of training (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, metavar="N", help="default 1500, with --quick 300")
    args = parser.parse_args()
    args.steps = args.steps or (300 if args.quick else 1500)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def run(loss: str, args: argparse.Namespace, out: Path, scenes: Scenes, held_out: Scenes) -> dict:
    """Train a detector with one loss, and leave what it is worth in `out`; empty if nothing is."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = Detector(loss).to(args.device)
    started = time.perf_counter()
    losses = train(model, scenes, args.steps, args.seed)
    seconds = time.perf_counter() - started
    if not losses:
        return {}
    metrics = {
        "loss": loss,
        "steps": len(losses),
        "interrupted": len(losses) < args.steps,
        "seed": args.seed,
        "training_seconds": round(seconds, 1),
        "steps_per_second": round(len(losses) / seconds, 2),
        "train_scenes": len(scenes.images),
        "held_out_scenes": len(held_out.images),
        "device": args.device,
        "ops": {op.__name__: dlops_triton.implementation(args.device) for op in OPS},
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: str(m.__version__) for m in (torch, triton, dlops_triton)},
        },
    }
    torch.save(model.state_dict(), out / "model.pt")
    plot_losses(out / "loss.png", loss, losses)
    report = out / "metrics.json"
    report.write_text(json.dumps(metrics, indent=2) + "\n")
    if metrics["interrupted"]:
        print(f"Interrupted after {len(losses)} steps; {out} holds what was learnt.")
        print("Evaluating it. Ctrl-C again to leave at once.")

    found = detect(model, held_out.images)
    metrics |= evaluate(found, held_out)
    report.write_text(json.dumps(metrics, indent=2) + "\n")
    plot_detections(out / "detections.png", found, held_out)
    some = Scenes(*(t[:50] for t in held_out))
    with torch.no_grad():
        logits, _ = model(some.images)
    labels, _ = assign(model.points, some.boxes, some.labels)
    plot_gradients(out / "gradients.png", loss, logits, labels)
    return metrics


def main() -> int:
    args = arguments()
    for op in OPS:
        print(f"{op.__name__:20}{dlops_triton.implementation(args.device)}")

    torch.manual_seed(args.seed)
    # The held-out scenes are the same whatever the seed, so that runs can be compared.
    scenes = compose("train", 600 if args.quick else 1500, args.seed, **BAR).to(args.device)
    held_out = compose("held-out", 100 if args.quick else 200, 0, **BAR).to(args.device)
    found = []
    for loss in NAMES if args.loss == "all" else (args.loss,):
        found.append(
            run(loss, args, args.out / loss if args.loss == "all" else args.out, scenes, held_out)
        )
        if not found[-1] or found[-1]["interrupted"]:
            break
    if not found[0]:
        print("Interrupted before anything was learnt.")
        return 130
    digits = int((held_out.labels < CLASSES).sum())
    print(f"\n{digits:,} digits in {len(held_out.images)} held-out scenes")
    print(f"{'loss':14}{'AP':>8}{'AP50':>8}{'AP75':>8}{'steps/s':>9}")
    for row in filter(None, found):
        precision = "".join(f"{row[name]:8.3f}" for name in ("AP", "AP50", "AP75"))
        print(f"{row['loss']:14}{precision}{row['steps_per_second']:9.1f}")
    print(
        f"\ndetections.png, gradients.png, loss.png, metrics.json and model.pt are in {args.out}"
        + (", in a folder for each loss" if args.loss == "all" else "")
    )
    return 130 if not found[-1] or found[-1]["interrupted"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
