"""Train a small detector of handwritten digits with dlops_triton, and see what it finds.

    python examples/digits_detector.py            # about 2 minutes on two CPU cores
    python examples/digits_detector.py --quick    # half a minute, and a weaker detector
    python examples/digits_detector.py --loss all # one detector with each loss, compared
    python examples/digits_detector.py --nms all  # one detector, each NMS on crowded scenes
    python examples/digits_detector.py --dcn      # with a deformable layer and without, compared

An anchor-free, FCOS-like network: every fourth pixel, both ways, says which digit is centred there
and how far its box extends. `box_match` says which points should see a digit, `--loss` what trains
the classes, by default `sigmoid_focal_loss`, and `generalized_box_iou_loss` trains the boxes.
`--nms` says what removes the duplicates, by default `batched_nms`, else `soft_nms`; `box_iou` tells
hits from misses in the pictures, and pycocotools' COCOeval judges the result, on writers and on
parts of the photographs that the network has never seen. `--dcn` turns and slants the digits, and
puts `deform_conv2d` in the place of one convolution. Ctrl-C ends the training early; what was
learnt so far is saved and evaluated.
"""

import argparse
import contextlib
import io
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from digits_dcn import LAYERS, plot_sampling, verdict
from digits_losses import NAMES, class_loss, plot_gradients
from digits_network import Detector, targets
from digits_nms import METHODS, Detections, detect, print_crowded
from digits_pictures import plot_crowded, plot_detections, plot_losses
from digits_scenes import CLASSES, Scenes, compose
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from tqdm import tqdm

import dlops_triton
from dlops_triton import (
    batched_nms,
    box_iou,
    box_match,
    deform_conv2d,
    generalized_box_iou_loss,
    ghmc_loss,
    sigmoid_focal_loss,
    soft_nms,
    softmax_focal_loss,
)

OPS = (
    box_match,
    sigmoid_focal_loss,
    softmax_focal_loss,
    ghmc_loss,
    generalized_box_iou_loss,
    batched_nms,
    soft_nms,
    box_iou,
    deform_conv2d,
)
BATCH = 4
# A bar that redraws itself in a terminal, and a line now and then in a log file.
BAR = {"mininterval": 0.2 if sys.stderr.isatty() else 10, "ncols": 88}


def train(
    model: Detector, scenes: Scenes, steps: int, seed: int, title: str
) -> list[tuple[float, float]]:
    """Train `model` in place; return the two losses of every step. Ctrl-C ends it early."""
    of_classes = class_loss(model.loss, model.points.device)
    rates = [4e-3, 4e-3 / 10]  # the lower one for what computes offsets, as in the paper
    groups = [{"params": parameters} for parameters in model.parameter_groups()]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.2)
    shuffle = torch.Generator().manual_seed(seed)
    device = scenes.images.device
    losses: list[tuple[float, float]] = []
    model.train()
    with (
        contextlib.suppress(KeyboardInterrupt),
        tqdm(range(steps), f"training, {title}", unit="step", **BAR) as bar,
    ):
        for _ in bar:
            batch = torch.randint(len(scenes.images), (BATCH,), generator=shuffle).to(device)
            images, boxes, labels = (t[batch] for t in scenes)
            logits, predicted = model(images)
            classes, wanted = targets(model.points, boxes, labels)
            digit = (classes >= 0) & (classes < CLASSES)
            count = digit.sum()
            ours = of_classes(logits, classes, count)
            iou = generalized_box_iou_loss(predicted[digit], wanted[digit], reduction="mean")
            optimizer.zero_grad()
            (ours + iou / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
            schedule.step()
            losses.append((ours.item(), iou.item()))
            bar.set_postfix(loss=f"{np.mean(losses[-50:], axis=0).sum():.3f}", refresh=False)
    return losses


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loss", choices=(*NAMES, "all"), default="focal", help="of the classes")
    parser.add_argument(
        "--nms",
        choices=(*METHODS, "all"),
        default="hard",
        help="all: compare them, where it crowds",
    )
    parser.add_argument(
        "--dcn",
        action="store_true",
        help="compare a deformable layer with a plain one, on digits turned and slanted",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and fewer scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of training (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="default 1500, --dcn 600, --quick 300"
    )
    args = parser.parse_args()
    if args.loss == args.nms == "all":
        parser.error("--nms all compares on one detector: choose one --loss with it")
    if args.dcn and "all" in (args.loss, args.nms):
        parser.error("--dcn compares two layers: choose one --loss and one --nms with it")
    args.steps = args.steps or (300 if args.quick else 600 if args.dcn else 1500)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def run(
    name: str, args: argparse.Namespace, out: Path, scenes: Scenes, held_out: Scenes
) -> dict[str, Any]:
    """Train the detector `name`, a loss or one of LAYERS, and leave what it is worth in `out`.

    Empty if nothing was learnt.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    loss = args.loss if args.dcn else name
    model = Detector(loss, dcn=name == "deformable").to(args.device)
    started = time.perf_counter()
    losses = train(model, scenes, args.steps, args.seed, name)
    seconds = time.perf_counter() - started
    if not losses:
        return {}
    metrics = {
        "loss": loss,
        **({"layer": name} if args.dcn else {}),
        "nms": METHODS[0] if args.nms == "all" else args.nms,
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

    found = detect(model, held_out.images, metrics["nms"])
    metrics |= evaluate(found, held_out)
    if args.nms == "all":
        metrics["crowded"] = compare(model, len(held_out.images), out / "nms.png")
    report.write_text(json.dumps(metrics, indent=2) + "\n")
    plot_detections(out / "detections.png", found, held_out)
    some = Scenes(*(t[:50] for t in held_out))
    with torch.no_grad():
        logits, _ = model(some.images)
    labels, _ = targets(model.points, some.boxes, some.labels)
    plot_gradients(out / "gradients.png", loss, logits, labels)
    if name == "deformable":
        plot_sampling(args.out / "sampling.png", model, held_out)
    return metrics


def compare(model: Detector, count: int, picture: Path) -> dict[str, dict[str, float]]:
    """What each NMS makes of the same detector in `count` crowded held-out scenes."""
    device = str(model.points.device)
    scenes = compose("held-out", count, 0, crowded=True, **BAR).to(device)
    found = {nms: detect(model, scenes.images, nms) for nms in METHODS}
    plot_crowded(picture, found, scenes)
    return {nms: evaluate(detections, scenes) for nms, detections in found.items()}


def main() -> int:
    args = arguments()
    for op in OPS:
        print(f"{op.__name__:26}{dlops_triton.implementation(args.device)}")

    torch.manual_seed(args.seed)
    count = 600 if args.quick else 1500
    # To be judged in crowded scenes, the detector trains on as many of them as of the others.
    crowded = count // 2 if args.nms == "all" else 0
    scenes = compose("train", count - crowded, args.seed, deformed=args.dcn, **BAR)
    if crowded:
        more = compose("train", crowded, args.seed, crowded=True, **BAR)
        scenes = Scenes(*(torch.cat(pair) for pair in zip(scenes, more, strict=True)))
    scenes = scenes.to(args.device)
    # The held-out scenes are the same whatever the seed, so that runs can be compared.
    held_out = compose("held-out", 100 if args.quick else 200, 0, deformed=args.dcn, **BAR)
    held_out = held_out.to(args.device)
    kind = "layer" if args.dcn else "loss"
    names = LAYERS if args.dcn else NAMES if args.loss == "all" else (args.loss,)
    found = []
    for name in names:
        out = args.out / name if len(names) > 1 else args.out
        found.append(run(name, args, out, scenes, held_out))
        if not found[-1] or found[-1]["interrupted"]:
            break
    if not found[0]:
        print("Interrupted before anything was learnt.")
        return 130
    digits = int((held_out.labels < CLASSES).sum())
    turned = ", turned and slanted" * args.dcn
    print(f"\n{digits:,} digits{turned} in {len(held_out.images)} held-out scenes")
    print(f"{kind:16}{'AP':>8}{'AP50':>8}{'AP75':>8}{'steps/s':>9}")
    for row in filter(None, found):
        precision = "".join(f"{row[name]:8.3f}" for name in ("AP", "AP50", "AP75"))
        print(f"{row[kind]:16}{precision}{row['steps_per_second']:9.1f}")
    if found[0].get("crowded"):
        print_crowded(found[0]["crowded"], len(held_out.images))
    if args.dcn and len(found) == 2 and all(found):
        print(verdict(*(row["AP"] for row in found)))
    print(
        f"\ndetections.png, gradients.png, loss.png, {'nms.png, ' * (args.nms == 'all')}"
        f"metrics.json and model.pt are in {args.out}"
        + (f", in a folder for each {kind}" if len(names) > 1 else "")
        + "; sampling.png is beside them" * args.dcn
    )
    return 130 if not found[-1] or found[-1]["interrupted"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
