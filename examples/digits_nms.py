"""From the detector's boxes to digits: the candidates, and three ways to drop the duplicates.

Where two digits of a class overlap, hard NMS takes the less sure one for a duplicate and drops it.
Soft-NMS (Bodla et al., "Improving Object Detection With One Line of Code", ICCV 2017) only lowers
its score, and so keeps, less sure, the true duplicates that hard NMS is rid of.
"""

from typing import NamedTuple

import torch
from digits_losses import probabilities
from digits_network import Detector
from digits_scenes import CLASSES, SIZE
from torch import Tensor

from dlops_triton import batched_nms, soft_nms

METHODS = ("hard", "soft-linear", "soft-gaussian")
# The usual settings. In crowds 0.7 is better for hard NMS, 0.7 and 1.5 for the soft forms.
HARD_IOU = 0.5
LINEAR_IOU, SIGMA = 0.3, 0.5  # those of the paper
# A box less sure than this counts for nothing, before NMS or after a decay. Far below any score
# that matters: 0.001 moves AP by less than 0.01.
MIN_SCORE = 0.02


class Detections(NamedTuple):
    scene: Tensor  # [K] int64
    boxes: Tensor  # [K, 4] xyxy
    scores: Tensor  # [K], descending within a scene
    labels: Tensor  # [K] int64

    def of(self, scene: int, min_score: float = 0) -> "Detections":
        chosen = (self.scene == scene) & (self.scores > min_score)
        return Detections(*(t[chosen] for t in self))


def suppress(nms: str, boxes: Tensor, scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the boxes that are left, by descending score, and the scores they have then."""
    if nms == "hard":
        kept = batched_nms(boxes, scores, group, HARD_IOU, score_threshold=MIN_SCORE)
        return kept, scores[kept]
    method = nms.removeprefix("soft-")
    return soft_nms(boxes, scores, LINEAR_IOU, SIGMA, MIN_SCORE, method, idxs=group)


@torch.inference_mode()
def detect(model: Detector, images: Tensor, nms: str = "hard", candidates: int = 300) -> Detections:
    """Find the digits in `images` [N, 3, SIZE, SIZE]."""
    model.eval()
    found = []
    for first in range(0, len(images), 20):
        logits, boxes = model(images[first : first + 20])
        scores, best = probabilities(model.loss, logits).flatten(1).topk(candidates)
        point, label = best // CLASSES, best % CLASSES
        boxes = boxes.take_along_dim(point[..., None], dim=1).clamp(0, SIZE)
        scene = torch.arange(len(scores), device=scores.device)[:, None].expand_as(label)
        scene, label, scores, boxes = (t.flatten(0, 1) for t in (scene, label, scores, boxes))
        # One call for all scenes and classes: boxes compete within their scene and class only.
        kept, scores = suppress(nms, boxes, scores, scene * CLASSES + label)
        found.append((scene[kept] + first, boxes[kept], scores, label[kept]))
    return Detections(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def print_crowded(crowded: dict[str, dict[str, float]], scenes: int) -> None:
    """A table of what each NMS is worth, and in words which is best."""
    print(f"\nThe same detector in {scenes} crowded held-out scenes")
    print(f"{'nms':16}{'AP':>8}{'AP50':>8}{'AP75':>8}")
    for nms, row in crowded.items():
        print(f"{nms:16}" + "".join(f"{row[name]:8.3f}" for name in ("AP", "AP50", "AP75")))
    print(verdict({nms: row["AP"] for nms, row in crowded.items()}))


def verdict(ap: dict[str, float]) -> str:
    """The better of the two Soft-NMS against hard NMS, in words."""
    soft = max(METHODS[1:], key=lambda nms: ap[nms])
    ahead = ap[soft] - ap["hard"]
    if abs(ahead) < 0.005:
        return f"Hardly a difference: {soft} and hard NMS are within 0.005 AP of each other."
    if ahead < 0:
        return (
            f"Soft-NMS does not win here: {soft}, its better form, is {-ahead:.3f} AP behind hard."
        )
    return f"Soft-NMS wins here: {soft} is {ahead:.3f} AP ahead of hard, at usual settings."
