"""What the tuner tries, and what that compiles to where there is no GPU to try it on."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlops_triton import _settings

from . import bench as bench_
from . import rows
from .bench import DTYPES, Bench
from .gpus import Gpu

Values = dict[str, int]


@dataclass(frozen=True)
class Task:
    """One thing to decide: the settings of a kernel for inputs of ``size`` bytes per element."""

    bench: Bench
    setting: str
    size: int

    def __str__(self) -> str:
        return f"{self.setting}, {self.size} bytes"

    def present(self, gpu: str, target: str) -> Values:
        """The settings that count on a GPU of that name and target now."""
        dtype = next(d for d in DTYPES.values() if d.itemsize == self.size)
        return dict(_settings.ALL[self.setting].look_up(gpu, target, dtype))

    def others(self, present: Values) -> list[Values]:
        """What there is to try beside the present settings, the nearest to them first."""
        space = self.bench.settings[self.setting]
        default = _settings.ALL[self.setting].defaults[torch.float32]
        products = itertools.product(*space.values())
        found = [
            dict(default),
            *({**present, **dict(zip(space, p, strict=True))} for p in products),
        ]
        distinct = {json.dumps(v, sort_keys=True): v for v in found if v != present}
        return sorted(
            distinct.values(), key=lambda v: sum(abs(math.log2(v[k] / present[k])) for k in v)
        )


def tasks(benches: Sequence[Bench]) -> list[Task]:
    return [
        Task(bench, setting, size)
        for bench in benches
        for setting in bench.settings
        for size in sorted({DTYPES[d].itemsize for case in bench.cases for d in case.dtypes})
    ]


def words(values: Values) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def compile_only(benches: Sequence[Bench], for_gpus: Sequence[Gpu]) -> int:
    """Print what the candidates compile to for some GPUs; returns the exit status of a command."""
    if not rows.IN_CHECKOUT:
        print(
            "No GPU found, and without one the candidates are compiled by the test tools, which "
            "are in a checkout of the repository and not in the installed package."
        )
        return 2
    sys.path.insert(0, str(rows.ROOT))
    gate = importlib.import_module("tests.tools.compile_gate")
    for gpu in for_gpus:
        print(f"No GPU found: compiling for {gpu.name}, about a minute per op.", flush=True)
        names = ",".join((gpu.target, *(bench.name for bench in benches)))
        print(report(gate.run_gate(f"{__name__}:{names}", [gpu.target]), gpu))
    return 0


def __getattr__(name: str) -> list[tuple[str, Callable[[], None]]]:
    """The compile gate's cases: an attribute that is called, for example, ``sm_90,focal,nms``."""
    target, *ops = name.split(",")
    if not ops:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cases = []
    for task in tasks([bench_.load(op) for op in ops]):
        present = task.present("", target)
        cases.append((f"{task}: {words(present)} (at present)", _in_small(task, present)))
        cases += [(f"{task}: {words(v)}", _in_small(task, v)) for v in task.others(present)]
    return cases


def _in_small(task: Task, values: Values) -> Callable[[], None]:
    """The first small call that launches with these settings."""

    def call() -> None:
        with task.bench.shrunk(), _settings.override(task.setting, **values) as used:
            for case in task.bench.cases:
                dtypes = [d for d in case.dtypes if DTYPES[d].itemsize == task.size]
                for dtype, mode in itertools.product(dtypes[:1], case.modes):
                    small = case.shrunk()
                    inputs = task.bench.make(small, DTYPES[dtype], torch.device("cpu"))
                    bench_.bind(task.bench, "ours", small, mode, inputs)()
                    if used.launches:
                        return

    return call


def report(records: Sequence[Any], gpu: Gpu) -> str:
    """A line for each kernel that a candidate compiles to and none before it did."""
    lines = [
        f"COMPILED FOR {gpu.name} ({gpu.target}), NOT MEASURED: nothing is decided, and no table "
        f"written.",
        "",
        f"{'candidate':76} {'kernel':20} {'regs':>4} {'spill':>5} {'shared':>6} {'occupancy':>9}",
    ]
    for record in records:
        line = f"{record.case:76} {record.kernel:20} "
        if record.error:
            lines.append(f"{line}REFUSED: {record.error.splitlines()[0]}")
            continue
        code = record.code
        share = gpu.occupancy(code.registers, record.shared, record.num_warps)
        lines.append(f"{line}{code.registers:4} {code.spilled:5} {record.shared:6} {share:9.0%}")
    return "\n".join(lines)
