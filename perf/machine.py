"""What the machine is and what it can do: its roofs, measured in the run that they are used in."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from .bench import DTYPES
from .rows import Row, said

_N = 8192  # of the square matrices that are multiplied


def gpu(device: torch.device) -> Row:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"gpu": torch.cuda.get_device_name(device), "driver": said(*query)}


def roofs(device: torch.device) -> Row:
    """Rates of copying, counting both directions, and of multiplying matrices of random numbers.

    The fp32 product runs on the vector units, as long as torch's default of no TF32 stands.
    """
    size = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {"roof_copy_bytes_per_s": 2 * size / _median_s(lambda: target.copy_(source))}
    for name in ("bf16", "fp32"):
        a = torch.randn(_N, _N, dtype=DTYPES[name], device=device)
        b = torch.randn_like(a)
        out = torch.empty_like(a)
        seconds = _median_s(functools.partial(torch.mm, a, b, out=out))
        found[f"roof_matmul_{name}_flop_per_s"] = 2 * _N**3 / seconds
    torch.cuda.empty_cache()
    return {name: round(rate) for name, rate in found.items()}


def _median_s(call: Callable[[], object], times: int = 20) -> float:
    """The median time of a call, by events, after as many calls to warm up."""
    samples = []
    for _ in range(2 * times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return float(np.median(samples[times:]))
