"""Detection and recognition kernels in Triton, as drop-in torch functions."""

from . import (
    _installation,  # first, for it says what is lacking  # noqa: F401
    _scripting,
)
from ._dispatch import implementation
from .deform import deform_conv2d, deform_sample
from .focal import sigmoid_focal_loss
from .ghm import ghmc_loss, ghmr_loss
from .iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from .iou_loss import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)
from .match import box_match
from .nms import batched_nms, nms, nms_padded
from .soft_nms import soft_nms, soft_nms_padded
from .softmax_focal import softmax_focal_loss

# After the ops, which they are made of.
from . import compat  # isort: skip
from ._patch import Patch, install_mmcv_ops, patch  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "Patch",
    "batched_nms",
    "box_iou",
    "box_match",
    "compat",
    "complete_box_iou",
    "complete_box_iou_loss",
    "deform_conv2d",
    "deform_sample",
    "distance_box_iou",
    "distance_box_iou_loss",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "ghmc_loss",
    "ghmr_loss",
    "implementation",
    "install_mmcv_ops",
    "nms",
    "nms_padded",
    "patch",
    "sigmoid_focal_loss",
    "soft_nms",
    "soft_nms_padded",
    "softmax_focal_loss",
]

for _name in __all__:
    # The functions of compat are scripted, as calls of Python.
    if callable(vars()[_name]) and not isinstance(vars()[_name], type):
        vars()[_name].__prepare_scriptable__ = _scripting.refused(f"dlops_triton.{_name}")
