"""Invented result rows over the real benchmarks, for tests of pictures and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlops_triton.perf import OPS, bench
from dlops_triton.perf.bench import Bench, Case
from dlops_triton.perf.rows import Row

GPU = "Invented GPU 9000"
PROVENANCE = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "dlops_triton": "0.0.1",
    "commit": "abcdef012345",
    "date": "2001-02-03T04:05:06+00:00",
    "command": "python -m dlops_triton.perf run --cases full",
}
ROOFS = {
    "copy_bytes_per_s": 4.2e12,
    "triad_bytes_per_s": 4.1e12,
    "l2_bytes_per_s": 9e12,
    "instructions_per_s": 28e12,
    **{f"matmul_{name}_flop_per_s": 7e14 for name in ("bf16", "fp16")},
    "matmul_tf32_flop_per_s": 4e14,
    "matmul_fp32_flop_per_s": 5e13,
    "launch_us": 2.4,
    "graph_launch_us": 1.1,
    "barrier_us": 1.9,
}
MACHINE = {"gpu": GPU, "driver": "570.1", "target": "sm_90", "roofs": ROOFS}

WORK = bench.jobs([bench.load(op) for op in OPS], bench.DTYPES, "full")

LEFT_OUT = "torch.compile takes no loop whose length depends on data"

WAITING = ("nms", "soft_nms")  # for the size of their result

# How many times our time a peer takes.
_SLOWER = {
    "ours": 1.0,
    "eager": 9.0,
    "compile": 1.8,
    "torchvision": 6.0,
    "mmdet": 20.0,
    "fused": 1.5,
    "columns": 2.0,
    "conv2d": 1.1,
    "numpy": 90.0,
}


def probe(**columns: Any) -> Row:
    return {"kind": "probe", **MACHINE, **PROVENANCE, **columns}


def measured(losing: Sequence[str] = ("staircase",), **columns: Any) -> list[Row]:
    """Every case and provider; where the case's name has a word of ``losing``, ours is slow."""
    rng = np.random.default_rng(0)
    found: list[Row] = []
    for known, case, dtype, mode in WORK:
        for provider in known.providers:
            row = {
                "kind": "measured",
                **_work_row(known, case, dtype, mode),
                **MACHINE,
                **PROVENANCE,
                "provider": provider,
            }
            if known.name in WAITING and provider == "compile":
                row["left_out"] = LEFT_OUT
            elif known.name == "nms" and provider == "eager" and case.sizes["n"] > 20_000:
                row["left_out"] = "its N x N matrices are made for at most 20000 boxes"
            else:
                lost = any(word in case.name for word in losing)
                factor = _SLOWER[provider] * rng.uniform(0.85, 1.2)
                row |= _times(row, provider, factor * (12 if lost and provider == "ours" else 1))
            found.append(row | columns)
    return found


def predicted(**columns: Any) -> list[Row]:
    """Ours, of every case."""
    found: list[Row] = []
    for known, case, dtype, mode in WORK:
        row = _work_row(known, case, dtype, mode)
        bytes_us, work_us = row["bytes"] * 1.05 / 4.3e6, row["operations"] * 1.7 / 33e6
        launches = 12 if known.name in WAITING else 1 + mode.count("+")
        times = {"bytes": bytes_us, "instructions": work_us, "launches": 2.5 * launches}
        limit = max(times, key=lambda name: times[name])
        small = known.bytes(case.shrunk(), mode, bench.DTYPES[dtype].itemsize)
        found.append(
            {
                "kind": "predicted",
                **row,
                "gpu": GPU,
                "target": "sm_90",
                "provider": "ours",
                "roofs": ROOFS | {"copy_bytes_per_s": 4.3e12, "instructions_per_s": 33e12},
                **PROVENANCE,
                "predicted_us": times[limit],
                "limit": limit,
                "launches": launches,
                "requested_bytes": int(small * 1.1),
                "sector_bytes": int(small * 1.05),
                "small_bytes": small,
                "peak_memory": _memory(row, "ours"),
                "kernels": [_kernel(name, times[limit], limit) for name in known.kernels],
                **columns,
            }
        )
    return found


def some(rows: Sequence[Row], *cases: str) -> list[Row]:
    """The rows of these cases."""
    return [row for row in rows if row["case"] in cases]


def _work_row(known: Bench, case: Case, dtype: str, mode: str) -> Row:
    return {
        "op": known.name,
        "case": case.name,
        "sizes": dict(case.sizes),
        "mode": mode,
        "dtype": dtype,
        **bench.amounts(known, case, dtype, mode),
    }


def _times(row: Row, provider: str, factor: float) -> Row:
    least = max(row["bytes"] / 4.2e6, row["operations"] / 28e6, row.get("products", 0) / 4e8)
    device = (1.25 * least + 3) * factor
    launches = {"ours": 2, "eager": 14, "compile": 3, "torchvision": 9, "mmdet": 60}.get(
        provider, 1
    )
    waits = row["op"] in WAITING
    clocks = {"device": device, "warm": 0.8 * device + 0.5, "eager": device + 7 + 3 * launches}
    times = {
        f"{clock}_{name}_us": round(time * spread, 3)
        for clock, time in clocks.items()
        for name, spread in (("p20", 0.98), ("p50", 1.0), ("p80", 1.03))
    }
    return {
        "error": 1e-7,
        "first_call_s": 1.234,
        "clock": "events" if waits else "graph",
        **times,
        "samples": 50,
        "peak_memory": _memory(row, provider),
        "launches": launches,
        "synchronisations": int(waits),
        "kernels": {f"{provider}_kernel_{i}": device * 0.9 / 2**i / 2 for i in range(launches)},
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "temperature_c": 41,
        "power_w": 402.5,
    }


def _memory(row: Row, provider: str) -> int:
    n = row["sizes"]["n"]
    if row["op"] == "nms":
        pairs = {"ours": min(n, 16_384) ** 2 // 8, "eager": 9 * n * n}
        return int(40 * n + pairs.get(provider, n * n // 8))
    return int(row["bytes"] * {"ours": 0.5, "eager": 5, "compile": 0.6}.get(provider, 4))


def _kernel(name: str, us: float, limit: str) -> Row:
    return {
        "kernel": name,
        "constants": {"BLOCK": 1024, "REDUCE": True},
        "registers": 40,
        "spilled": 0,
        "stack": 0,
        "shared": 128,
        "warps": 4,
        "occupancy": 0.75,
        "per_element": 16.5,
        "special_per_element": 3.0,
        "us": us,
        "limit": limit,
        "error": None,
    }
