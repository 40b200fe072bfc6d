"""The ops under other libraries' names, signatures and conventions.

``dlops_triton.compat.torchvision``, ``.mmcv``, ``.mmdet`` and ``.detectron2`` can be imported in
place of the library they are named after, which need not be installed. ``dlops_triton.patch`` puts
them into an installed one. docs/differences.md lists where their answers differ, and why.
"""

from . import detectron2, mmcv, mmdet, torchvision

__all__ = ["detectron2", "mmcv", "mmdet", "torchvision"]
