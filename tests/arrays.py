"""From torch to the oracle's side."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def numpy(t: Tensor) -> NDArray[Any]:
    """Values on the CPU, floating point as float64, the others as they are."""
    return t.detach().cpu().to(torch.float64 if t.is_floating_point() else t.dtype).numpy()
