"""Clocks: what a call costs the device with a cold L2, and what it costs the caller.

Device time is that of CUDA graphs, each of many calls that take turns on enough sets of inputs to
outgrow the L2 three times, so that neither launches nor a warm cache are measured. A call that
waits for the device cannot be captured; it is timed by events after the L2 was overwritten, and
what the host does between its launches counts. Eager time is the wall clock around one call and
the wait for it. Every provider takes one sample of each in turn, so that a drift of the clocks
meets all alike.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from . import bench as bench_
from .bench import DTYPES, TOLERANCE, AbsentError, Bench, Case, Inputs, Outputs
from .rows import Row

Call = Callable[[], Outputs]
Sampler = Callable[[], float]  # takes one sample, in seconds

_CALLS = 20  # in a graph at least, so that starting the graph does not count
_SETS = 1024  # of inputs at most


class RefusedError(Exception):
    """A provider that gave a wrong answer, and how wrong."""


@dataclass
class Contender:
    """One provider at work on one case."""

    provider: str
    calls: list[Call]  # the same work on different memory
    error: float
    first_call_s: float
    samplers: dict[str, Sampler] = field(default_factory=dict)  # by clock
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    bench: Bench,
    case: Case,
    dtype: str,
    mode: str,
    device: torch.device,
    say: Callable[[str, str], None] = lambda provider, what: None,
    rounds: tuple[int, int] = (5, 50),
    share_s: float = 3.0,
) -> list[Row]:
    """Time every provider that gives the right answer.

    A provider is checked at full size, against the eager formula in fp64, and on the small case,
    against the numpy reference.

    Args:
        say: is told of each provider what is being done to it, or why it is left out.
        rounds: samples of each clock, at least and at most.
        share_s: after the least number, sampling ends once it took so long per provider.

    Returns:
        The part of a row that was measured, per provider.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # torch.compile gives up on a function after eight shapes
    try:
        return _measure(bench, case, dtype, mode, device, say, rounds, share_s)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    bench: Bench,
    case: Case,
    dtype: str,
    mode: str,
    device: torch.device,
    say: Callable[[str, str], None],
    rounds: tuple[int, int],
    share_s: float,
) -> list[Row]:
    inputs = bench.make(case, DTYPES[dtype], device)
    small = bench.make(case.shrunk(), DTYPES[dtype], device)
    size = bench.bytes(case, mode, DTYPES[dtype].itemsize)
    sets = [
        inputs,
        *({k: v.clone() for k, v in inputs.items()} for _ in range(_sets(size, device))),
    ]
    want = _truth(bench, case, mode, inputs)
    contenders = []
    for provider in bench.providers:
        say(provider, "checking")
        try:
            contender = _prepare(bench, provider, case, dtype, mode, sets, small, want)
            say(provider, "capturing")
            _add_clocks(contender, bench, device)
        except (AbsentError, RefusedError) as e:
            say(provider, f"left out: {e}")
        except Exception as e:  # a peer that breaks must not end the run
            say(provider, f"left out: {type(e).__name__}: {str(e).strip()[:200]}")
        else:
            contenders.append(contender)
    del want
    samplers = [
        (c.samples.setdefault(clock, []), sampler)
        for c in contenders
        for clock, sampler in c.samplers.items()
    ]
    say("all", "timing")
    _interleave(samplers, rounds, share_s * len(contenders))
    rows = [_row(c) for c in contenders]
    for contender, row in zip(contenders, rows, strict=True):
        # Last: the profiler makes launches slower.
        row["launches"] = count_launches(contender.calls[0], device)
    return rows


def _sets(size: int, device: torch.device) -> int:
    """How many copies of the inputs it takes, beside the first, to outgrow the L2."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-3 * l2 // size), 2), _SETS) - 1


def _truth(bench: Bench, case: Case, mode: str, inputs: Inputs) -> Outputs:
    """The right answer at full size: the eager formula in fp64, or else the numpy reference.

    The reference checks the formula, and all others, on the small case.
    """
    if bench.exact or "eager" not in bench.providers:
        return bench_.expected(bench, case, inputs, mode)
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
    return bench_.bind(bench, "eager", case, mode, wide)()


def _prepare(
    bench: Bench,
    provider: str,
    case: Case,
    dtype: str,
    mode: str,
    sets: Sequence[Inputs],
    small: Inputs,
    want: Outputs,
) -> Contender:
    """Bind a provider, run it for the first time, and refuse it unless its answers are right."""
    device = next(iter(small.values())).device
    calls = [bench_.bind(bench, provider, case, mode, inputs) for inputs in sets]
    synchronize(device)
    start = time.perf_counter()
    got = calls[0]()
    synchronize(device)
    first_call_s = time.perf_counter() - start
    error = bench_.error(got, want, bench.exact)
    del got
    shrunk = case.shrunk()
    got = bench_.bind(bench, provider, shrunk, mode, small)()
    small_error = bench_.error(got, bench_.expected(bench, shrunk, small, mode), bench.exact)
    if not max(error, small_error) <= TOLERANCE[dtype]:
        raise RefusedError(
            f"WRONG, so not timed: relative error {error:.1e}, in small {small_error:.1e}, of at "
            f"most {TOLERANCE[dtype]:.0e}"
        )
    return Contender(provider, calls, error, first_call_s)


def _add_clocks(contender: Contender, bench: Bench, device: torch.device) -> None:
    """Warm up, and make a sampler for each clock. Without a GPU there is only the caller's."""
    turns = _cycle(contender.calls)
    contender.samplers["eager"] = lambda: _wall(next(turns), device)
    for _ in range(3):
        contender.samplers["eager"]()
    if device.type != "cuda":
        return
    contender.facts["peak_memory"] = _peak_memory(contender.calls[0], device)
    if bench.capturable:
        contender.facts["clock"] = "graph"
        contender.samplers["device"] = _graph_sampler(contender.calls)
    else:
        contender.facts["clock"] = "events"
        contender.samplers["device"] = _event_sampler(turns, device)


def _cycle(calls: Sequence[Call]) -> Iterator[Call]:
    while True:
        yield from calls


def _wall(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _graph_sampler(calls: Sequence[Call]) -> Sampler:
    """Replays one graph of at least ``_CALLS`` calls; a sample is their mean."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    count = len(calls) * -(-_CALLS // len(calls))
    # Outputs are kept for one turn, so that they too go to different memory.
    kept: list[Outputs] = [()] * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            kept[i % len(calls)] = calls[i % len(calls)]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    sample()
    return sample


def _event_sampler(turns: Iterator[Call], device: torch.device) -> Sampler:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    rubbish = torch.empty(3 * l2, dtype=torch.int8, device=device)

    def sample() -> float:
        call = next(turns)
        rubbish.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def _interleave(
    samplers: Sequence[tuple[list[float], Sampler]], rounds: tuple[int, int], limit_s: float
) -> None:
    start = time.perf_counter()
    least, most = rounds
    for i in range(most):
        for samples, sampler in samplers:
            samples.append(sampler())
        if i + 1 >= least and time.perf_counter() - start > limit_s:
            break


def _row(contender: Contender) -> Row:
    row: Row = {
        "provider": contender.provider,
        "error": contender.error,
        "first_call_s": round(contender.first_call_s, 3),
        "peak_memory": None,
        "clock": None,
        **contender.facts,
    }
    for clock in ("device", "eager"):
        samples = contender.samples.get(clock)
        quantiles = np.quantile(samples, (0.2, 0.5, 0.8)) if samples else (None,) * 3
        for name, value in zip(("p20", "p50", "p80"), quantiles, strict=True):
            row[f"{clock}_{name}_us"] = None if value is None else round(float(value) * 1e6, 3)
    row["samples"] = len(contender.samples["eager"])
    return row


def _peak_memory(call: Call, device: torch.device) -> int:
    """Bytes that a call holds at its worst moment beside its inputs, outputs included."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def count_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels that a call launches, copies and fills not counted; None where nobody can tell."""
    if device.type != "cuda":
        return None
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    kernels = [
        event.name
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels) or None
