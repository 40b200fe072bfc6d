"""Clocks: what a call costs the device, with a cold and a warm L2, and what it costs the caller.

Device time is that of CUDA graphs of many calls, so that launches are not measured. For a cold L2
the calls take turns on enough sets of inputs to outgrow it three times; for a warm one they all
work on one set. A call that waits for the device cannot be captured; it is timed by events, after
the L2 was overwritten or not, and what the host does between its launches counts. Eager time is the
wall clock around one call and the wait for it. Every provider takes one sample of each in turn, so
that a drift of the clocks meets all alike.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import bench as bench_
from . import machine
from .bench import DTYPES, TOLERANCE, AbsentError, Bench, Case, Inputs, Outputs
from .rows import Row

Call = Callable[[], Outputs]
Sampler = Callable[[], float]  # takes one sample, in seconds
Say = Callable[[str, str], None]  # is told of a provider what is being done to it

CLOCKS = ("device", "warm", "eager")
# In a graph, so that starting it does not count: so many calls, or for so long.
_CALLS, _GRAPH_S = 20, 2e-3
_SETS = 1024  # of inputs at most


class RefusedError(Exception):
    """A provider that gave a wrong answer, and how wrong."""


@dataclass
class Contender:
    """One provider at work on one case: checked, warmed up, with a sampler for each clock."""

    provider: str
    calls: list[Call]  # the same work on different memory
    error: float | None  # None: it does other work
    first_call_s: float
    samplers: dict[str, Sampler] = field(default_factory=dict)  # by clock
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)


@dataclass
class Problem:
    """One case with its inputs and the right answers, which all providers share.

    A provider is checked at full size, against the eager formula in fp64 or what is right by
    construction, and on the small case, against the numpy reference. The reference so checks the
    formula, and all others.
    """

    bench: Bench
    case: Case
    dtype: str
    mode: str
    device: torch.device

    def __post_init__(self) -> None:
        bench, case, dtype = self.bench, self.case, DTYPES[self.dtype]
        inputs = bench.make(case, dtype, self.device)
        size = bench.bytes(case, self.mode, dtype.itemsize)
        copies = range(_sets(size, self.device))
        self.sets = [inputs, *({k: v.clone() for k, v in inputs.items()} for _ in copies)]
        self.small = bench.make(case.shrunk(), dtype, self.device)
        self.want = self._truth(inputs)
        self.small_want = bench_.expected(bench, case.shrunk(), self.small, self.mode)

    def _truth(self, inputs: Inputs) -> Outputs:
        if self.bench.known is not None:
            return (self.bench.known(self.case, inputs),)
        if "eager" not in self.bench.providers:
            return bench_.expected(self.bench, self.case, inputs, self.mode)
        wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
        return bench_.bind(self.bench, "eager", self.case, self.mode, wide)()

    def contender(self, provider: str, say: Say = lambda provider, what: None) -> Contender:
        """Bind a provider, check its answers, warm it up and capture its graphs.

        Raises:
            RefusedError: its answer is wrong.
            AbsentError: it cannot do this case.
        """
        bench = self.bench
        say(provider, "checking")
        calls = [bench_.bind(bench, provider, self.case, self.mode, i) for i in self.sets]
        synchronize(self.device)
        start = time.perf_counter()
        got = calls[0]()
        synchronize(self.device)
        first_call_s = time.perf_counter() - start
        if provider in bench.unlike:
            contender = Contender(provider, calls, None, first_call_s)
            contender.facts["unlike"] = bench.unlike[provider]
        else:
            contender = Contender(provider, calls, self._error(provider, got), first_call_s)
        del got
        say(provider, "capturing")
        _add_clocks(contender, bench, self.device)
        return contender

    def _error(self, provider: str, got: Outputs) -> float:
        bench = self.bench
        error = bench_.error(got, self.want, bench.exact)
        small = bench_.bind(bench, provider, self.case.shrunk(), self.mode, self.small)()
        small_error = bench_.error(small, self.small_want, bench.exact)
        tolerance = TOLERANCE[bench_.precision(self.case, self.dtype)]
        if not max(error, small_error) <= tolerance:
            raise RefusedError(
                f"WRONG, so not timed: relative error {error:.1e}, in small {small_error:.1e}, of "
                f"at most {tolerance:.0e}"
            )
        return error


def contender(
    bench: Bench, provider: str, case: Case, dtype: str, mode: str, device: torch.device
) -> Contender:
    """One provider alone on one case; see :meth:`Problem.contender`."""
    return Problem(bench, case, dtype, mode, device).contender(provider)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    bench: Bench,
    case: Case,
    dtype: str,
    mode: str,
    device: torch.device,
    say: Say = lambda provider, what: None,
    rounds: tuple[int, int] = (5, 50),
    share_s: float = 3.0,
) -> list[Row]:
    """Time every provider that gives the right answer.

    Args:
        say: is told of each provider what is being done to it, or why it is left out.
        rounds: samples of each clock, at least and at most.
        share_s: after the least number, sampling ends once it took so long per provider.

    Returns:
        The part of a row that was measured, or the reason why it was not, per provider.
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
    say: Say,
    rounds: tuple[int, int],
    share_s: float,
) -> list[Row]:
    contenders: list[Contender] = []
    left_out: list[Row] = []
    try:
        problem = Problem(bench, case, dtype, mode, device)
    except torch.OutOfMemoryError:
        return [{"provider": p, "left_out": "too little memory"} for p in bench.providers]
    for provider in bench.providers:
        try:
            contenders.append(problem.contender(provider, say))
        except Exception as e:  # a peer that breaks must not end the run
            _raise_interrupt(e)
            reason = str(e) if isinstance(e, AbsentError | RefusedError) else _short(e)
            say(provider, f"left out: {reason}")
            left_out.append({"provider": provider, "left_out": reason})
    del problem  # and the right answers with it
    samplers = [
        (c.samples.setdefault(clock, []), sampler)
        for c in contenders
        for clock, sampler in c.samplers.items()
    ]
    say("all", "timing")
    with machine.Watch(device) as watch:
        _interleave(samplers, rounds, share_s * len(contenders))
    rows = [_row(c) | watch.row for c in contenders]
    for contender, row in zip(contenders, rows, strict=True):
        # Last: the profiler makes launches slower.
        row["synchronisations"] = count_synchronisations(contender.calls[0], device)
        row["kernels"] = kernels = kernel_times(contender.calls[0], device)
        row["launches"] = sum(count for count, _ in kernels.values()) or None
        row["kernels"] = {name: round(us, 3) for name, (_, us) in kernels.items()}
    return rows + left_out


def _raise_interrupt(error: BaseException) -> None:
    """Raise what an error took the place of if that was to end the run, as Ctrl-C in a capture."""
    cause = error.__cause__ or error.__context__
    if cause is not None:
        if not isinstance(cause, Exception):
            raise cause
        _raise_interrupt(cause)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def _sets(size: int, device: torch.device) -> int:
    """How many copies of the inputs it takes, beside the first, to outgrow the L2."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-3 * l2 // size), 2), _SETS) - 1


def _add_clocks(contender: Contender, bench: Bench, device: torch.device) -> None:
    """Warm up, and make a sampler for each clock. Without a GPU there is only the caller's."""
    calls = contender.calls
    turns = itertools.cycle(calls)
    took = min(_wall(next(turns), device) for _ in range(3))
    if device.type == "cuda":
        contender.facts["peak_memory"] = _peak_memory(calls[0], device)
        contender.facts["clock"] = "graph" if bench.capturable else "events"
        for clock, some in (("device", calls), ("warm", calls[:1])):
            if bench.capturable:
                least = min(_CALLS, math.ceil(_GRAPH_S / took))
                contender.samplers[clock] = _graph_sampler(some, least, device)
            else:
                contender.samplers[clock] = _event_sampler(some, device)
    contender.samplers["eager"] = lambda: _wall(next(turns), device)


def _wall(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _graph_sampler(calls: Sequence[Call], least: int, device: torch.device) -> Sampler:
    """Replays one graph of all calls, in turn, and at least so many; a sample is their mean."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    count = len(calls) * -(-least // len(calls))
    # Outputs are kept for one turn, so that they too go to different memory.
    kept: list[Outputs] = [()] * len(calls)
    graph = torch.cuda.CUDAGraph()
    with _capture(graph, device):
        for i in range(count):
            kept[i % len(calls)] = calls[i % len(calls)]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        if len(calls) == 1:
            graph.replay()  # others have had the L2 since
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    sample()
    return sample


@contextlib.contextmanager
def _capture(graph: Any, device: torch.device) -> Iterator[None]:
    """``torch.cuda.graph``, and after a failure the device as it was.

    torch 2.11 leaves the stream current and the memory pool in use, and then no capture works.
    """
    before, pool = torch.cuda.current_stream(device), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


def _event_sampler(calls: Sequence[Call], device: torch.device) -> Sampler:
    """Times single calls by events: of several with the L2 overwritten, of one with it warm."""
    turns = itertools.cycle(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    rubbish = torch.empty(3 * l2, dtype=torch.int8, device=device) if len(calls) > 1 else None

    def sample() -> float:
        call = next(turns)
        if rubbish is None:
            call()
        else:
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
    for clock in CLOCKS:
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


def count_synchronisations(call: Callable[[], object], device: torch.device) -> int | None:
    """How often a call makes the host wait for the device; None without one."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing" in str(w.message) for w in caught)


def kernel_times(call: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kernel of a call, copies and fills left out.

    Empty where nobody can tell: without a GPU, or where the profiler may not look.
    """
    found: dict[str, tuple[int, float]] = {}
    if device.type != "cuda":
        return found
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        synchronize(device)
    for event in profiler.events() or ():
        if (
            event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(("Memcpy", "Memset"))
        ):
            count, us = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, us + event.time_range.elapsed_us()
    return found
