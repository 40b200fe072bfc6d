"""The benchmarks' own correctness: cases, cost model, clocks, and what they refuse to time."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops_triton
from dlops_triton import _dispatch

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")

from dlops_triton.perf import OPS, bench, rows, timing
from dlops_triton.perf.bench import Bench, Case

CPU = torch.device("cpu")
NMS: Any = sys.modules[dlops_triton.nms.__module__]

# A few programs of a kernel, and in the interpreter a fraction of a second.
TINY = {"focal": {"n": 40, "c": 80}, "iou": {"n": 33, "m": 17}, "nms": {"n": 96, "kept": 16}}

# What of its sizes an op gives to its kernels.
ARGUMENTS: dict[str, Callable[[Mapping[str, int]], list[int]]] = {
    "focal": lambda sizes: [sizes["n"] * sizes["c"], sizes["c"]],
    "iou": lambda sizes: [sizes["n"], sizes["m"]],
    "nms": lambda sizes: [sizes["n"]],
}


def tiny(op: str) -> list[tuple[Bench, Case, str]]:
    """Each different kind of case of an op, with its modes."""
    known = bench.load(op)
    kinds = {(case.option, "classes" in case.sizes): case for case in (*known.cases, *known.sweep)}
    found = []
    for (option, classes), case in kinds.items():
        sizes = dict(TINY[op]) | ({"classes": 4} if classes else {})
        if option == "staircase":
            sizes["kept"] = sizes["n"] // 2
        case = dataclasses.replace(case, sizes=sizes, small=sizes)
        found += [(known, case, mode) for mode in case.modes]
    return found


@pytest.mark.parametrize("op", OPS)
def test_every_kind_of_case_is_answered_rightly_by_ours_and_by_the_formula(op: str) -> None:
    for known, case, mode in tiny(op):
        for dtype in case.dtypes:
            only = dataclasses.replace(
                known, providers={name: known.providers[name] for name in ("ours", "eager")}
            )
            said: list[tuple[str, str]] = []
            found = timing.measure(
                only, case, dtype, mode, CPU, lambda *words, s=said: s.append(words), rounds=(1, 1)
            )
            assert [row["provider"] for row in found] == ["ours", "eager"], said
            assert all(row["error"] <= bench.TOLERANCE[dtype] for row in found)


@pytest.mark.parametrize("op", OPS)
def test_the_cost_model_grows_with_the_problem_and_the_small_case_is_specialised_alike(
    op: str,
) -> None:
    known = bench.load(op)
    for case in (*known.cases, *known.sweep):
        for mode in case.modes:
            small = case.shrunk()
            assert known.bytes(case, mode, 4) > known.bytes(small, mode, 4) > 0
            assert known.bytes(case, mode, 4) > known.bytes(case, mode, 2)
            assert known.operations(case, mode) > known.operations(small, mode) > 0
        divisible = [
            [argument % 16 == 0 for argument in ARGUMENTS[op](sizes)]
            for sizes in (case.sizes, case.small)
        ]
        assert divisible[0] == divisible[1]


def test_the_least_bytes_of_the_focal_loss() -> None:
    known = bench.load("focal")
    summed, unreduced = known.cases[:2]
    n, c = summed.sizes["n"], summed.sizes["c"]
    assert known.bytes(summed, "fwd", 2) == 2 * n * c + 8 * n
    assert known.bytes(summed, "fwd+bwd", 2) == 2 * 2 * n * c + 8 * n
    assert known.bytes(unreduced, "fwd+bwd", 4) == 5 * 4 * n * c + 2 * 8 * n


def test_nms_keeps_as_many_boxes_as_its_cases_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")
    known = bench.load("nms")
    for case in (*known.cases, *known.sweep):
        for sized in (case, case.shrunk()):
            if sized.sizes["n"] > 20_000:
                continue
            inputs = known.make(sized, torch.float32, CPU)
            assert len(known.providers["ours"](sized, inputs)()) == sized.sizes["kept"]


def test_a_small_case_of_nms_launches_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(_dispatch, "launch", lambda *args, **settings: launches.append(args[0]))
    monkeypatch.setattr(_dispatch, "cpu_implementation", "kernel")
    known = bench.load("nms")

    def launched(case: Case) -> list[Any]:
        launches.clear()
        known.providers["ours"](case, known.make(case, torch.float32, CPU))()
        return list(launches)

    full = [launched(case) for case in known.cases]
    monkeypatch.setattr(NMS, "BAND", NMS.BAND)  # so that what shrink does is undone
    known.shrink()
    assert [launched(case.shrunk()) for case in known.cases] == full


# --- clocks and refusals ---------------------------------------------------------------------


def square(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
    return lambda: inputs["x"] ** 2


def slow(seconds: float) -> bench.Provider:
    def bind(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        def call() -> Tensor:
            time.sleep(seconds)
            return inputs["x"] ** 2

        return call

    return bind


def absent(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
    raise bench.AbsentError("it is on holiday")


def broken(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
    raise ZeroDivisionError("a bug")


def times(factor: float) -> bench.Provider:
    return lambda case, inputs: lambda: inputs["x"] ** 2 * factor


CASE = Case("some", {"n": 1000}, {"n": 10}, dtypes=("fp32",))


def squaring(**providers: bench.Provider) -> Bench:
    """A benchmark of squaring numbers."""
    return Bench(
        name="square",
        cases=(CASE,),
        sweep=(),
        make=lambda case, dtype, device: {"x": torch.arange(case.sizes["n"], dtype=dtype)},
        providers=providers,
        reference=lambda case, i, mode: (
            (i["x"].numpy() ** 2,) if mode == "fwd" else (i["x"].numpy() ** 2, 2 * i["x"].numpy())
        ),
        bytes=lambda case, mode, itemsize: 2 * itemsize * case.sizes["n"],
        operations=lambda case, mode: case.sizes["n"],
        leaves=("x",),
    )


def measure(known: Bench, mode: str = "fwd", **options: Any) -> tuple[list[rows.Row], list[str]]:
    said: list[str] = []
    found = timing.measure(
        known, CASE, "fp32", mode, CPU, lambda who, what: said.append(f"{who} {what}"), **options
    )
    return found, said


def test_a_planted_sleep_is_what_the_callers_clock_shows() -> None:
    found, _ = measure(squaring(ours=slow(0.004), peer=slow(0.02)), rounds=(5, 5))
    ours, peer = found
    assert (ours["samples"], peer["samples"]) == (5, 5)
    for row, microseconds in ((ours, 4_000), (peer, 20_000)):
        assert microseconds <= row["eager_p20_us"] <= row["eager_p50_us"] <= row["eager_p80_us"]
        assert row["eager_p20_us"] < 4 * microseconds
        assert row["device_p50_us"] is row["launches"] is row["peak_memory"] is row["clock"] is None
    assert peer["first_call_s"] >= 0.02


def test_providers_take_turns_until_their_time_is_up() -> None:
    order: list[str] = []
    samplers = [([], lambda n=name: order.append(n) or 0.0) for name in "ab"]  # type: ignore[func-returns-value]
    timing._interleave(samplers, (2, 9), limit_s=0.0)
    assert order == ["a", "b", "a", "b"]
    assert [len(samples) for samples, _ in samplers] == [2, 2]


def test_wrong_absent_and_broken_providers_are_left_out_with_the_reason() -> None:
    found, said = measure(
        squaring(
            wrong=times(1.001),
            nan=times(float("nan")),
            holiday=absent,
            broken=broken,
            ours=square,
        ),
        rounds=(1, 1),
    )
    assert [row["provider"] for row in found] == ["ours"]
    left_out = [words for words in said if "left out" in words]
    assert [words.split()[0] for words in left_out] == ["wrong", "nan", "holiday", "broken"]
    assert "WRONG" in left_out[0]
    assert "1.0e-03" in left_out[0]
    assert "inf" in left_out[1]
    assert "on holiday" in left_out[2]
    assert "ZeroDivisionError: a bug" in left_out[3]


def test_a_wrong_gradient_or_shape_is_refused() -> None:
    def detached(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: (inputs["x"] * inputs["x"].detach()).sum()

    def cut(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: (inputs["x"] ** 2)[1:]

    summed = dataclasses.replace(
        squaring(ours=lambda case, i: lambda: (i["x"] ** 2).sum(), detached=detached),
        reference=lambda case, i, mode: ((i["x"].numpy() ** 2).sum(), 2 * i["x"].numpy()),
    )
    found, _ = measure(summed, "fwd+bwd", rounds=(1, 1))
    assert [row["provider"] for row in found] == ["ours"]
    assert not measure(squaring(cut=cut), rounds=(1, 1))[0]


def test_errors_of_outputs() -> None:
    one = torch.ones(4)
    assert bench.error((one,), (one,)) == 0
    assert bench.error((one, 1.5 * one), (one, one)) == pytest.approx(0.5)
    assert bench.error((one[:3],), (one,)) == float("inf")
    assert bench.error((one / 0,), (one,)) == float("inf")
    assert bench.error((one * 1.0000001,), (one,), exact=True) == float("inf")
    assert bench.error((torch.zeros(0),), (torch.zeros(0),)) == 0


def fake_cuda(log: list[str], elapsed_ms: float) -> SimpleNamespace:
    """As much of ``torch.cuda`` as the clocks need."""

    class Recorder:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> None:
            log.append("in")

        def __exit__(self, *_: object) -> None:
            log.append("out")

        def wait_stream(self, other: object) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def replay(self) -> None:
            log.append("replay")

        def elapsed_time(self, other: object) -> float:
            return elapsed_ms

    properties = SimpleNamespace(L2_cache_size=100)
    return SimpleNamespace(
        Stream=Recorder,
        Event=Recorder,
        CUDAGraph=Recorder,
        stream=Recorder,
        graph=Recorder,
        current_stream=Recorder,
        get_device_properties=lambda device: properties,
    )


@pytest.mark.parametrize(("sets", "calls"), [(2, 20), (3, 21), (40, 40)])
def test_a_graph_takes_turns_on_its_inputs_and_shares_its_time_among_its_calls(
    monkeypatch: pytest.MonkeyPatch, sets: int, calls: int
) -> None:
    log: list[str] = []
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake_cuda(log, elapsed_ms=6.0)))
    thunks = [lambda i=i: (log.append(str(i)), ())[1] for i in range(sets)]  # type: ignore[misc]
    sample = timing._graph_sampler(thunks)  # type: ignore[arg-type]
    warm_up, capture, _ = (part.split() for part in " ".join(log).split("out"))
    assert warm_up == ["in", *(str(i) for i in range(min(sets, 3)))]
    assert capture == ["in", *(str(i % sets) for i in range(calls))]
    assert sample() == pytest.approx(6e-3 / calls)
    assert log[-1] == "replay"


def test_inputs_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=fake_cuda([], 0)))
    cuda = torch.device("cuda")
    assert timing._sets(10, cuda) + 1 == 30  # of 10 bytes, against 100 of cache
    assert timing._sets(10**9, cuda) + 1 == 2
    assert timing._sets(1, cuda) + 1 == 300
