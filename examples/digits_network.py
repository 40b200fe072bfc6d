"""The digit detector's network, and what each of its points should predict.

Every fourth pixel, both ways, is a point that predicts one digit and one box. What it should
predict is a matter of the anchors around it.
"""

import math

import torch
from digits_losses import outputs
from digits_scenes import CLASSES, SIZE
from torch import Tensor, nn

from dlops_triton import box_match
from dlops_triton.nn import ModulatedDeformConv2dPack

STRIDE = 4  # pixels from one point of prediction to the next
HEIGHTS = (15, 19, 24, 31, 40)  # of a point's anchors; two thirds as wide, as most digits are
# For the match, boxes grow by so many pixels on every side. As they are, the smallest digits get a
# single point each and the largest eight; so they get three to six, and AP rises by 0.02.
MARGIN = 16
POS_IOU, NEG_IOU = 0.8, 0.75  # of boxes so grown
IGNORED = -100  # the class of a point that trains nothing


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


def deformable(plain: nn.Conv2d) -> ModulatedDeformConv2dPack:
    """A deformable layer to take the place of `plain`: with its weights, and at first its taps.

    At first all masks are a half, which a BatchNorm after it makes up for.
    """
    layer = ModulatedDeformConv2dPack(
        plain.in_channels,
        plain.out_channels,
        plain.kernel_size,
        plain.stride,
        plain.padding,
        bias=False,
    )
    layer.weight = plain.weight
    return layer


class Detector(nn.Module):
    """From images [B, 3, SIZE, SIZE] to class logits [B, P, C] and boxes [B, P, 4].

    C is CLASSES, or one more if ``loss`` is a softmax's. With ``dcn`` the last convolution before
    classes and boxes part, the one that both are read from, is deformable.
    """

    def __init__(self, loss: str = "focal", width: int = 48, dcn: bool = False):
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
        if dcn:  # once all is drawn at random, so that nothing else is different
            last = self.mix.body[1]
            last[0] = deformable(last[0])
        ticks = STRIDE * (torch.arange(SIZE // STRIDE) + 0.5)
        self.register_buffer("points", torch.cartesian_prod(ticks, ticks).flip(1))  # [P, 2], xy
        self.to(memory_format=torch.channels_last)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All others, and those that compute the offsets and masks of the deformable layer."""
        offsets, others = [], []
        for name, parameter in self.named_parameters():
            (offsets if "conv_offset" in name else others).append(parameter)
        return others, offsets

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        x = self.fine(self.stem(x))
        x = self.mix(x + self.coarse(x))
        logits, sides = (head(x).flatten(2).mT for head in (self.classes, self.sides))
        left_top, right_bottom = sides.clamp(max=5).exp().chunk(2, dim=2)
        return logits, torch.cat([self.points - left_top, self.points + right_bottom], dim=2)


def anchors(points: Tensor) -> Tensor:
    """[P, sizes, 4] xyxy, around each of the points [P, 2]."""
    height = torch.tensor(HEIGHTS, device=points.device)
    half = torch.stack([height / 3, height / 2], dim=1)
    return torch.cat([points[:, None] - half, points[:, None] + half], dim=2)


def targets(points: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give every point the class [B, P] and box [B, P, 4] it should predict.

    ``box_match`` decides, about all anchors of all points: one that covers a digit with an IoU of
    at least POS_IOU is that digit's, and so is whichever covers it best; one below NEG_IOU is
    background, class CLASSES; one in between is IGNORED. Of its anchors a point takes after the
    one of largest IoU, a digit's before all others.
    """
    all_sizes = anchors(points)
    matched, iou = box_match(
        grown(all_sizes.flatten(0, 1)),
        grown(boxes),
        pos_iou=POS_IOU,
        neg_iou=NEG_IOU,
        min_pos_iou=0.2,
        gt_valid=labels < CLASSES,
    )
    matched, iou = (t.unflatten(1, all_sizes.shape[:2]) for t in (matched, iou))
    best = torch.where(matched >= 0, iou + 1, iou).argmax(2, keepdim=True)
    matched = matched.gather(2, best)[..., 0]
    owner = matched.clamp(min=0)
    classes = labels.gather(1, owner)
    classes = classes.masked_fill(matched == -1, CLASSES).masked_fill(matched == -2, IGNORED)
    return classes, boxes.take_along_dim(owner[..., None], dim=1)


def grown(boxes: Tensor) -> Tensor:
    return boxes + MARGIN * boxes.new_tensor([-1, -1, 1, 1])
