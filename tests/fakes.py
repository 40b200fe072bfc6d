"""A clock, a GPU and a benchmark that are made up, for tests of the performance lab."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlops_triton.perf import bench, machine, run, timing
from dlops_triton.perf.bench import Bench, Case

CASE = Case("some", {"n": 1000}, {"n": 10}, dtypes=("fp32",))
L2_BYTES = 20_000  # so that two and a half sets of CASE's inputs and outputs fill it


class FakeTime:
    """A host whose time passes only when something sleeps, and a device that works beside it.

    Stands in for the module ``time``, and has as much of ``torch.cuda`` as the clocks need.
    """

    def __init__(self) -> None:
        self.host = 0.0
        self.device = 0.0
        self.captured: list[float] | None = None
        self.sync_mode: int | str = 0
        self.replays = 0
        self.freed: list[object] = []  # pools of captures that failed
        self.alarm: tuple[float, type[BaseException]] | None = None

    def perf_counter(self) -> float:
        return self.host

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self._pass_until(self.host + seconds)

    def _pass_until(self, host: float) -> None:
        if self.alarm is not None and host >= self.alarm[0]:
            self.host, error = self.alarm
            self.alarm = None
            raise error
        self.host = max(self.host, host)

    @contextlib.contextmanager
    def deadline(self, seconds: float | None) -> Iterator[None]:
        """Stands in for that of ``run``."""
        self.alarm = None if seconds is None else (self.host + seconds, run.SpentError)
        yield

    def work(self, seconds: float) -> None:
        """Let the device do something, now or when the graph in the making is replayed."""
        if self.captured is not None:
            self.captured.append(seconds)
        else:
            self.device = max(self.device, self.host) + seconds

    def wait(self, *_: object) -> None:
        """Let the host wait for the device; a stream that is captured does not allow that."""
        assert self.captured is None, "the host waits for the device in a capture"
        self._pass_until(self.device)
        if self.sync_mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    @property
    def cuda(self) -> SimpleNamespace:
        fake = self

        class Stream:
            def __init__(self, *_: object) -> None: ...
            def wait_stream(self, other: object) -> None: ...

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.device = self.at = max(fake.device, fake.host)

            def synchronize(self) -> None:
                fake.wait()

            def elapsed_time(self, end: Any) -> float:
                milliseconds: float = 1e3 * (end.at - self.at)
                return milliseconds

        class Graph:
            def replay(self) -> None:
                fake.replays += 1
                fake.work(sum(self.work))

        @contextlib.contextmanager
        def graph(made: Any, pool: object) -> Iterator[None]:
            fake.captured = made.work = []
            try:
                yield
            finally:
                fake.captured = None

        def set_sync_debug_mode(mode: int | str) -> None:
            fake.sync_mode = mode

        return SimpleNamespace(
            CUDAGraph=Graph,
            Event=Event,
            Stream=Stream,
            current_device=lambda: 0,
            current_stream=Stream,
            empty_cache=lambda: None,
            get_device_properties=lambda device: SimpleNamespace(L2_cache_size=L2_BYTES),
            get_sync_debug_mode=lambda: fake.sync_mode,
            graph=graph,
            graph_pool_handle=object,
            is_available=lambda: True,
            max_memory_allocated=lambda device: 5000,
            memory_allocated=lambda device: 1000,
            reset_peak_memory_stats=lambda device: None,
            set_stream=lambda stream: None,
            set_sync_debug_mode=set_sync_debug_mode,
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=fake.wait,
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Let the clocks run on this; returns the device to give them."""

        class Rubbish:
            def zero_(rubbish) -> None:
                self.work(1.0)  # so long that it would show

        fake_torch = SimpleNamespace(
            _C=SimpleNamespace(
                _cuda_endAllocateToPool=lambda device, pool: self.freed.append(pool)
            ),
            _dynamo=SimpleNamespace(reset=lambda: None),
            cuda=self.cuda,
            empty=lambda *_, **__: Rubbish(),
            int8=torch.int8,
            OutOfMemoryError=torch.OutOfMemoryError,
        )
        monkeypatch.setattr(timing, "torch", fake_torch)
        monkeypatch.setattr(timing, "time", self)
        monkeypatch.setattr(timing, "kernel_times", lambda call, device: {"k": (2, 7.0)})
        state = {"sm_clock_mhz": 1980, "temperature_c": 50}
        monkeypatch.setattr(
            machine, "Watch", lambda device: contextlib.nullcontext(SimpleNamespace(row=state))
        )
        return SimpleNamespace(type="cuda")


def square(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
    return lambda: inputs["x"] ** 2


def times(factor: float) -> bench.Provider:
    return lambda case, inputs: lambda: inputs["x"] ** 2 * factor


def absent(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
    raise bench.AbsentError("it is on holiday")


def broken(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
    raise ZeroDivisionError("a bug")


def planted(
    fake: FakeTime, host: float, cold: float = 0.0, warm: float = 0.0, waits: bool = False
) -> bench.Provider:
    """A provider that takes the host and the device so long; ``warm`` on inputs just used."""
    last: list[object] = []

    def bind(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        def call() -> Tensor:
            fake.sleep(host)
            fake.work(warm if last and last[0] is inputs else cold)
            last[:] = [inputs]
            if waits:
                fake.wait()
            return inputs["x"] ** 2

        return call

    return bind


def squaring(
    providers: Mapping[str, bench.Provider], cases: tuple[Case, ...] = (CASE,), **options: Any
) -> Bench:
    """A benchmark of squaring numbers."""
    return Bench(
        name="square",
        cases=cases,
        small=(),
        sweep=(),
        make=lambda case, dtype, device: {"x": torch.arange(case.sizes["n"], dtype=dtype)},
        providers=providers,
        reference=lambda case, i, mode: (
            (i["x"].numpy() ** 2,) if mode == "fwd" else (i["x"].numpy() ** 2, 2 * i["x"].numpy())
        ),
        known=lambda case, i: i["x"] ** 2,
        bytes=lambda case, mode, itemsize: 2 * itemsize * case.sizes["n"],
        operations=lambda case, mode: case.sizes["n"],
        leaves=("x",),
        **options,
    )
