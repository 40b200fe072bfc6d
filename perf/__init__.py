"""The performance lab: ``python -m dlops_triton.perf``; README.md says how to read what it finds.

One benchmark per op, a ``BENCH`` in the module of that name, of what ``bench`` defines. Beside it:

command line   ``cli``
measuring      ``run`` (a run and its budget), ``timing`` (the clocks), ``machine`` and ``probe``
               (the GPU and its roofs), ``compare`` (another commit), ``gpu_check``, ``sanitize``
without a GPU  ``static``, ``counting``, ``model`` and ``gpus`` (the makers' numbers)
tuning         ``tune`` and ``candidates``
results        ``rows`` (the files), ``points`` (their numbers), ``roofline``, ``plots``, ``marks``
               and ``ink`` (the pictures), ``report``, ``sections``, ``page`` and ``causes``
"""

OPS = ("focal", "softmax_focal", "ghm", "iou", "iou_loss", "match", "nms", "soft_nms", "deform")
