"""Benchmarks: ``python -m dlops_triton.perf run`` times the ops where there is a GPU.

Without one it says what is known anyway. ``bench`` says what a benchmark is, and the modules of
``OPS`` hold one each, as ``BENCH``. ``timing`` and ``machine`` measure, ``static`` reports without
a GPU, ``rows`` keeps results and ``roofline`` draws them.
"""

OPS = ("focal", "iou", "nms")
