"""Scenes of handwritten digits on photographs, with everything held out kept apart.

The digits are scikit-learn's `load_digits`, the backgrounds its two sample photographs, so nothing
is downloaded. A scene holds 5 to 15 digits, 14 to 44 pixels tall, each in a colour that stands out
from what lies under it. They overlap, but no digit hides another. In a crowded scene most come in
pairs: beside a digit, and much in its way, another of the same class and about the same height. In
a deformed scene digits are turned and slanted much further than by a hand.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from tqdm import tqdm

SIZE = 128  # pixels, the side of a scene
CLASSES = 10
MIN_DIGITS, MAX_DIGITS = 5, 15
MAX_OVERLAP = 0.4  # of two boxes, as a share of the smaller one
PAIR_IOU = (0.3, 0.7)  # of the boxes of a pair, in crowded scenes
# The most that a digit turns, in radians, and slants, as a share of its height. A 6 turned by half
# a circle is a 9, so a deformed one turns by at most a sixth.
TURN, SLANT = 0.15, 0.15
DEFORMED_TURN, DEFORMED_SLANT = np.pi / 3, 0.5

# load_digits has no column for the writer, but its 1,797 rows are 14 forms of about 130 digits, one
# after the other: each is the same dictation and begins 0..9, 0..9, 0..9. The forms of a writer lie
# side by side (13 writers filled 14), so cutting between forms and leaving out the one at the cut
# puts no writer on both sides: 9 forms to train on, 1 left out, 4 held out.
DIGITS = {"train": slice(0, 1157), "held-out": slice(1287, 1797)}
# Columns of both photographs, which are 640 pixels wide.
PHOTOS = {"train": slice(213, 640), "held-out": slice(0, 213)}


class Scenes(NamedTuple):
    images: Tensor  # [N, 3, SIZE, SIZE] uint8
    boxes: Tensor  # [N, MAX_DIGITS, 4] float32, xyxy, tight around the ink; zeros where no digit is
    labels: Tensor  # [N, MAX_DIGITS] int64, the digit; CLASSES where none is

    def to(self, device: torch.device) -> "Scenes":
        return Scenes(*(t.to(device) for t in self))


def compose(
    split: str,
    count: int,
    seed: int,
    crowded: bool = False,
    deformed: bool = False,
    **bar: object,
) -> Scenes:
    """Compose `count` scenes of `split`, "train" or "held-out"."""
    composer = _Composer(split, seed, deformed)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    boxes = np.zeros((count, MAX_DIGITS, 4), np.float32)
    labels = np.full((count, MAX_DIGITS), CLASSES)
    for i in tqdm(range(count), "crowded scenes" if crowded else f"{split} scenes", **bar):
        canvas, where, what = composer.scene(crowded)
        images[i] = (canvas * 255).round()
        boxes[i, : len(where)] = where
        labels[i, : len(what)] = what
    return Scenes(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(boxes),
        torch.from_numpy(labels),
    )


class _Composer:
    def __init__(self, split: str, seed: int, deformed: bool = False):
        digits = load_digits()
        ink = digits.images[DIGITS[split]].astype(np.float32) / 16
        self.digits = np.pad(ink, ((0, 0), (2, 2), (2, 2)))  # [rows, 12, 12], ink in [0, 1]
        self.labels = digits.target[DIGITS[split]]
        self.photos = [photo[:, PHOTOS[split]] for photo in load_sample_images().images]
        self.rng = np.random.default_rng(seed)
        self.turn, self.slant = (DEFORMED_TURN, DEFORMED_SLANT) if deformed else (TURN, SLANT)

    def scene(self, crowded: bool) -> tuple[NDArray, NDArray, list[int]]:
        canvas = self.background()
        low = MAX_DIGITS - 5 if crowded else MIN_DIGITS
        count = self.rng.integers(low, MAX_DIGITS, endpoint=True)
        boxes = np.empty((0, 4), np.float32)
        labels: list[int] = []
        while len(labels) < count:
            row = self.rng.integers(len(self.digits))
            placed = self.place(row, np.exp(self.rng.uniform(np.log(14), np.log(44))))
            if overlap(placed[0], boxes).max(initial=0) > MAX_OVERLAP:
                continue
            paired = crowded and len(labels) + 1 < count
            partner = self.partner(row, placed[0], boxes) if paired else None
            for box, ink in (placed, partner) if partner else (placed,):
                x1, y1, x2, y2 = box.astype(int)
                patch = canvas[y1:y2, x1:x2]
                patch += ink[..., None] * (self.colour(patch) - patch)
                boxes = np.vstack([boxes, box])
                labels.append(self.labels[row])
        return canvas, boxes, labels

    def place(self, row: int, height: float) -> tuple[NDArray, NDArray]:
        """A digit somewhere in the scene: its box and its ink."""
        ink = self.ink(self.digits[row], height)
        h, w = ink.shape
        x, y = self.rng.integers(0, (SIZE - w, SIZE - h), endpoint=True)
        return np.array([x, y, x + w, y + h], np.float32), ink

    def partner(self, row: int, box: NDArray, others: NDArray) -> tuple[NDArray, NDArray] | None:
        """A digit of the class of `row`, about as tall and in its way; None where none fits."""
        rows = np.flatnonzero(self.labels == self.labels[row])
        for _ in range(20):
            height = (box[3] - box[1]) * self.rng.uniform(0.9, 1.1)
            ink = self.ink(self.digits[self.rng.choice(rows)], height)
            h, w = ink.shape
            x, y = (box[:2] + self.rng.uniform(-0.5, 0.5, 2) * (w, h)).round()
            near = np.array([x, y, x + w, y + h], np.float32)
            if (
                near.min() >= 0
                and near.max() <= SIZE
                and PAIR_IOU[0] <= iou(near, box) <= PAIR_IOU[1]
                and overlap(near, others).max(initial=0) <= MAX_OVERLAP
            ):
                return near, ink
        return None

    def background(self) -> NDArray:
        """A square crop of a photograph, at two thirds to one and a half times its scale."""
        photo = self.photos[self.rng.integers(len(self.photos))]
        side = self.rng.integers(SIZE * 2 // 3, SIZE * 3 // 2)
        y, x = self.rng.integers(0, np.subtract(photo.shape[:2], side), endpoint=True)
        crop = Image.fromarray(photo[y : y + side, x : x + side])
        if self.rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop.resize((SIZE, SIZE)), np.float32) / 255

    def ink(self, digit: NDArray, height: float) -> NDArray:
        """The digit enlarged, a little stretched, turned and slanted, and cropped to its ink."""
        stretch = self.rng.uniform(0.85, 1.15)
        turn, slant = self.rng.uniform(-1, 1, 2) * (self.turn, self.slant)
        cos, sin = np.cos(turn), np.sin(turn)
        # From the enlarged digit to the 8 x 8 one in the middle of its 12 x 12 frame.
        matrix = 8 / height * np.array([[stretch * cos, slant - sin], [sin, cos]])
        side = round(1.5 * height)
        offset = 6 - matrix @ [side / 2, side / 2]
        enlarged = Image.fromarray(digit).transform(
            (side, side),
            Image.Transform.AFFINE,
            (*matrix[0], offset[0], *matrix[1], offset[1]),
            Image.Resampling.BICUBIC,
        )
        ink = np.clip(2 * np.asarray(enlarged) - 0.4, 0, 1)  # crisper strokes
        rows, columns = np.nonzero(ink > 0.3)
        return ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]

    def colour(self, patch: NDArray) -> NDArray:
        """Of six random colours, the one furthest from what it will cover."""
        colours = self.rng.random((6, 3), np.float32)
        distances = np.square(colours - patch.mean(axis=(0, 1))).sum(axis=1)
        return colours[distances.argmax()]


def overlap(box: NDArray, boxes: NDArray) -> NDArray:
    """Intersection of `box` with each of `boxes`, over the smaller of the two areas."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return sides.clip(0).prod(axis=1) / np.minimum(areas, np.prod(box[2:] - box[:2]))


def iou(box: NDArray, other: NDArray) -> float:
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    both = sides.clip(0).prod()
    return both / (np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - both)
