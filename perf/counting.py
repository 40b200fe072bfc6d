"""The subprocesses of the report without a GPU: one that counts, one that compiles.

The first runs every case in small in the interpreter and counts bytes, and at full size with no
kernel run, which shows what is launched and allocated:

    python -m dlops_triton.perf.counting real focal bf16 sm_90     a line of JSON per case

The second is the compile gate's, which takes its cases from here, by a name such as
``real,focal,bf16``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dlops_triton import _settings

from . import OPS
from . import bench as bench_
from .bench import DTYPES, SETS, Bench, Case, Job
from .rows import Row

ROW = "row "  # begins the lines that the first subprocess prints for its parent
_CPU = torch.device("cpu")
# Of the compulsory bytes of a case: above this nothing is run at full size here.
_LARGEST = 1 << 30


def named(names: Sequence[str]) -> list[Job]:
    """The jobs that a list of an op's, a dtype's and a set of cases' names stands for."""
    benches = [bench_.load(n) for n in names if n in OPS]
    (cases,) = (n for n in names if n in SETS)
    return bench_.jobs(benches, [n for n in names if n in DTYPES], cases)


def _call(bench: Bench, case: Case, dtype: str, mode: str) -> Callable[[], Any]:
    """The library's own work on a case, inputs included."""
    inputs = bench.make(case, DTYPES[dtype], _CPU)
    return bench_.bind(bench, "ours", case, mode, inputs)


def _count(names: Sequence[str]) -> None:
    """The first subprocess: counts for each target, whose launch settings may be its own."""
    importlib.import_module("tests.tools.interpreter").install_fixes()
    dispatch: Any = importlib.import_module("dlops_triton._dispatch")
    torch.set_num_threads(1)
    targets = [n for n in names if not any(n in known for known in (OPS, DTYPES, SETS))]
    seen: dict[str, Row] = {}

    def once(count: Callable[..., Row], bench: Bench, case: Case, dtype: str, mode: str) -> Row:
        problem = [count.__name__, bench.name, case.sizes, case.option, dtype, mode]
        like = torch.empty(0, dtype=DTYPES[dtype])
        settings = [_settings.ALL[name].on(like) for name in bench.settings]
        key = json.dumps([problem, settings, dispatch.inline_ptx(_CPU)], default=dict)
        if key not in seen:
            seen[key] = count(bench, case, dtype, mode)
        return seen[key]

    for bench, case, dtype, mode in named(names):
        for target in targets:
            dispatch.gpu = lambda device, target=target: ("", target)
            row = {
                "target": target,
                "op": bench.name,
                "case": case.name,
                "sizes": dict(case.sizes),
                "mode": mode,
                "dtype": dtype,
                **bench_.amounts(bench, case, dtype, mode),
            }
            row |= once(_traffic, bench, case.shrunk(), dtype, mode)
            row |= once(_outline, bench, case, dtype, mode)
            print(ROW + json.dumps(row), flush=True)


def _traffic(bench: Bench, small: Case, dtype: str, mode: str) -> Row:
    """What the kernels of a small case ask for, and what they are specialised by."""
    traffic = importlib.import_module("tests.tools.traffic").traffic
    launches: list[Row] = []
    with bench.shrunk(), traffic(sectors=True) as meter:

        def run(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
            before, atomic = meter.dram, meter.atomic
            launch(kernel, grid, *args, **settings)
            plain = kernel.kwargs.get("do_not_specialize") or ()
            arguments = {
                part: _token(a, part != name or name not in plain)
                for name, argument in zip(kernel.arg_names, args, strict=False)
                for part, a in _parts(name, argument)
            }
            constants = {n: _plain(settings[n]) for n in kernel.arg_names if n in settings}
            launches.append(
                {
                    "kernel": kernel.fn.__name__,
                    "arguments": arguments,
                    "constants": constants,
                    "bytes": meter.dram - before,
                    "atomics": meter.atomic - atomic,
                }
            )

        with _launching(run) as launch:
            _call(bench, small, dtype, mode)()
        elements = {name: work.elements(small.sizes) for name, work in bench.kernels.items()}
    return {
        "small": dict(small.sizes),
        "small_bytes": bench.bytes(small, mode, DTYPES[dtype].itemsize),
        "small_elements": elements,
        "requested_bytes": meter.total,
        "sector_bytes": meter.dram,
        "small_launches": launches,
    }


def _outline(bench: Bench, case: Case, dtype: str, mode: str) -> Row:
    """What a case launches and allocates at full size; found without running a kernel."""
    size = bench.bytes(case, mode, DTYPES[dtype].itemsize)
    if size > _LARGEST:
        case = case.shrunk()
    programs: dict[str, list[int]] = {}

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        programs.setdefault(kernel.fn.__name__, []).append(math.prod(grid))

    with _launching(note):
        memory = _peak_memory(_call(bench, case, dtype, mode))
    scale = 1.0 if size <= _LARGEST else size / bench.bytes(case, mode, DTYPES[dtype].itemsize)
    return {
        "launches": sum(map(len, programs.values())),
        "programs": {name: [len(p), scale * sum(p) / len(p)] for name, p in programs.items()},
        "peak_memory": memory if scale == 1 else None,
    }


@contextlib.contextmanager
def _launching(instead: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """Let ``instead`` take the library's launches; yields what would have taken them."""
    dispatch: Any = importlib.import_module("dlops_triton._dispatch")
    launch = dispatch.launch
    dispatch.launch = instead
    try:
        yield launch
    finally:
        dispatch.launch = launch


def _peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call on CPU tensors holds at its worst moment beside its inputs."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    # Some torch versions warn of what happens in several cycles unless events are accumulated.
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        kept = call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    del kept
    return peak


def _parts(name: str, argument: Any) -> Iterator[tuple[str, Any]]:
    """An argument, or of a tuple its elements, by their names in the compile gate.

    Triton specialises by elements whatever ``do_not_specialize`` says of the tuple.
    """
    if not isinstance(argument, tuple):
        yield name, argument
        return
    for i, element in enumerate(argument):
        yield f"{name}[{i}]", element


def _plain(constant: Any) -> Any:
    """A constant as the compile gate writes it: of a tuple the words."""
    return constant if isinstance(constant, int | float | str | None) else str(constant)


def _token(argument: Any, specialized: bool = True) -> Any:
    """What of a runtime argument is part of the specialisation, as the compile gate writes it."""
    if isinstance(argument, torch.Tensor):
        name = str(argument.dtype).removeprefix("torch.")
        for long, short in (("bfloat", "bf"), ("float", "fp"), ("int", "i")):
            name = name.replace(long, short)
        return f"*{name}"
    if isinstance(argument, int) and (argument != 1 or not specialized):
        kind = "i32" if abs(argument) < 2**31 else "i64"
        return kind if argument % 16 or not specialized else f"{kind} tt.divisibility=16"
    return "fp32" if isinstance(argument, float) else argument  # None and 1 become constants


def __getattr__(name: str) -> list[tuple[str, Callable[[], Any]]]:
    """The compile gate's cases: an attribute that is called, for example, ``real,nms,fp32``."""
    names = name.split(",")
    if not all(any(n in known for n in names) for known in (OPS, DTYPES, SETS)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Cases that share a small one launch the same, so one of them will do.
    distinct: dict[str, Job] = {}
    for bench, case, dtype, mode in named(names):
        problem = json.dumps([bench.name, dict(case.small), case.option, dtype, mode])
        distinct.setdefault(problem, (bench, case, dtype, mode))
    return [
        (f"{bench.name} {case.name} {dtype} {mode}", _in_small(bench, case, dtype, mode))
        for bench, case, dtype, mode in distinct.values()
    ]


def _in_small(bench: Bench, case: Case, dtype: str, mode: str) -> Callable[[], None]:
    call = _call(bench, case.shrunk(), dtype, mode)

    def run() -> None:
        with bench.shrunk():
            call()

    return run


if __name__ == "__main__":
    _count(sys.argv[1:])
