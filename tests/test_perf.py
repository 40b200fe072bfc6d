"""The benchmarks' own correctness: cases, cost model, clocks, and what they refuse to time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
from tests.fakes import CASE, L2_BYTES, FakeTime, absent, broken, planted, square, squaring, times

CPU = torch.device("cpu")
NMS: Any = sys.modules[dlops_triton.nms.__module__]

# A few programs of a kernel, and in the interpreter a fraction of a second.
TINY = {
    "focal": {"n": 40, "c": 80},
    "softmax_focal": {"n": 40, "c": 80},
    "ghm": {"n": 40, "c": 80},
    "iou": {"n": 33, "m": 17},
    "iou_loss": {"n": 40},
    "match": {"n": 48, "m": 7},
    "nms": {"n": 96, "kept": 16},
    "soft_nms": {"n": 48},
    "deform": {
        "n": 1,
        "c": 16,
        "h": 2,
        "w": 5,
        "co": 16,
        "kh": 1,
        "kw": 3,
        "groups": 1,
        "sigma": 1,
    },
}

# What of its sizes an op gives to its kernels.
ARGUMENTS: dict[str, Callable[[Mapping[str, int]], list[int]]] = {
    "focal": lambda sizes: [sizes["n"] * sizes["c"], sizes["c"]],
    "softmax_focal": lambda sizes: [sizes["n"], sizes["c"]],
    "ghm": lambda sizes: [sizes["n"] * sizes["c"], sizes["c"]],
    "iou": lambda sizes: [sizes["n"], sizes["m"]],
    "iou_loss": lambda sizes: [sizes["n"]],
    "match": lambda sizes: [sizes["n"], sizes["m"]],
    "nms": lambda sizes: [sizes["n"]],
    "soft_nms": lambda sizes: [sizes["n"]],
    "deform": lambda sizes: [sizes[k] for k in "chw"] + [sizes["co"], sizes["h"] * sizes["w"]],
}


def every(known: Bench) -> tuple[Case, ...]:
    return (*known.cases, *known.small, *known.sweep)


def tiny(op: str) -> list[tuple[Bench, Case, str]]:
    """Each different kind of case of an op, with its modes."""
    known = bench.load(op)
    kinds = {(case.option, "classes" in case.sizes): case for case in every(known)}
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
            tolerance = bench.TOLERANCE[bench.precision(case, dtype)]
            assert all(row["error"] <= tolerance for row in found)


@pytest.mark.parametrize("op", OPS)
def test_the_cost_model_grows_with_the_problem_and_the_small_case_is_specialised_alike(
    op: str,
) -> None:
    known = bench.load(op)
    for case in every(known):
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


def test_nms_keeps_what_its_cases_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")
    known = bench.load("nms")
    assert known.known is not None
    for case in every(known):
        for sized in (case, case.shrunk()):
            if sized.sizes["n"] > 20_000:
                continue
            inputs = known.make(sized, torch.float32, CPU)
            kept = known.providers["ours"](sized, inputs)()
            assert len(kept) == sized.sizes["kept"]
            assert torch.equal(known.known(sized, inputs), kept)


def test_a_small_case_of_nms_launches_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(_dispatch, "launch", lambda *args, **settings: launches.append(args[0]))
    monkeypatch.setattr(_dispatch, "cpu_implementation", "kernel")
    known = bench.load("nms")

    def launched(case: Case) -> list[Any]:
        launches.clear()
        known.providers["ours"](case, known.make(case, torch.float32, CPU))()
        return list(launches)

    for case in every(known):
        full = launched(case)
        with known.shrunk():
            small = launched(case.shrunk())
        # The larger ones go through more bands, of the same kernels.
        assert set(small) == set(full)
        assert case.sizes["n"] > 25_000 or small == full


# --- clocks and refusals ---------------------------------------------------------------------


def measure(known: Bench, mode: str = "fwd", **options: Any) -> tuple[list[rows.Row], list[str]]:
    said: list[str] = []
    found = timing.measure(
        known, CASE, "fp32", mode, CPU, lambda who, what: said.append(f"{who} {what}"), **options
    )
    return found, said


def test_planted_times_are_what_each_clock_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime()
    device = fake.install(monkeypatch)
    ours = planted(fake, host=30e-6, cold=50e-6, warm=20e-6)
    peer = planted(fake, host=400e-6, cold=100e-6, warm=90e-6)
    known = squaring({"ours": ours, "peer": peer})
    found = timing.measure(known, CASE, "fp32", "fwd", device, rounds=(5, 5))
    assert [row["provider"] for row in found] == ["ours", "peer"]
    for row, device_us, warm_us, eager_us in (
        (found[0], 50, 20, 80),
        (found[1], 100, 90, 500),  # the host first, and then the wait for the device
    ):
        for quantile in ("p20", "p50", "p80"):
            assert row[f"device_{quantile}_us"] == pytest.approx(device_us, abs=0.01)
            assert row[f"warm_{quantile}_us"] == pytest.approx(warm_us, abs=0.01)
            assert row[f"eager_{quantile}_us"] == pytest.approx(eager_us, abs=0.01)
        assert row["clock"] == "graph"
        assert (row["launches"], row["kernels"], row["synchronisations"]) == (2, {"k": 7.0}, 0)
        assert (row["peak_memory"], row["samples"], row["error"]) == (4000, 5, 0)
        assert (row["sm_clock_mhz"], row["temperature_c"]) == (1980, 50)


def test_what_waits_is_timed_by_events_and_its_waits_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTime()
    device = fake.install(monkeypatch)
    waiting = planted(fake, host=40e-6, cold=50e-6, warm=20e-6, waits=True)
    known = squaring({"ours": waiting}, capturable=False)
    (row,) = timing.measure(known, CASE, "fp32", "fwd", device, rounds=(3, 3))
    assert row["clock"] == "events"
    # The device waits for the host between the events, but not for the rubbish before them.
    assert row["device_p50_us"] == pytest.approx(50, abs=0.01)
    assert row["warm_p50_us"] == pytest.approx(60, abs=0.01)
    assert row["eager_p50_us"] == pytest.approx(90, abs=0.01)
    assert row["synchronisations"] == 1
    # Captured instead, it is left out with the reason.
    known = squaring({"ours": waiting})
    (row,) = timing.measure(known, CASE, "fp32", "fwd", device, rounds=(3, 3))
    assert row == {
        "provider": "ours",
        "left_out": "AssertionError: the host waits for the device in a capture",
    }
    assert len(fake.freed) == 1


def test_a_planted_sleep_is_what_the_callers_clock_shows() -> None:
    def slow(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: (time.sleep(0.01), inputs["x"] ** 2)[1]

    ((row,), _) = measure(squaring({"ours": slow}), rounds=(5, 5))
    assert 10_000 <= row["eager_p20_us"] <= row["eager_p50_us"] <= row["eager_p80_us"]
    assert row["eager_p20_us"] < 40_000
    assert row["device_p50_us"] is row["launches"] is row["peak_memory"] is row["clock"] is None
    assert row["synchronisations"] is None
    assert row["first_call_s"] >= 0.01


def test_a_case_that_does_not_fit_is_left_out_for_all() -> None:
    def too_big(*_: Any) -> bench.Inputs:
        raise torch.OutOfMemoryError

    known = dataclasses.replace(squaring({"ours": square, "peer": square}), make=too_big)
    found, _ = measure(known)
    assert found == [{"provider": p, "left_out": "too little memory"} for p in ("ours", "peer")]


def test_providers_take_turns_until_their_time_is_up() -> None:
    order: list[str] = []
    samplers = [([], lambda n=name: order.append(n) or 0.0) for name in "ab"]  # type: ignore[func-returns-value]
    timing._interleave(samplers, (2, 9), limit_s=0.0)
    assert order == ["a", "b", "a", "b"]
    assert [len(samples) for samples, _ in samplers] == [2, 2]


def test_wrong_absent_and_broken_providers_are_left_out_with_the_reason() -> None:
    found, said = measure(
        squaring(
            {
                "wrong": times(1.001),
                "nan": times(float("nan")),
                "holiday": absent,
                "broken": broken,
                "ours": square,
            }
        ),
        rounds=(1, 1),
    )
    assert [row["provider"] for row in found] == ["ours", "wrong", "nan", "holiday", "broken"]
    assert [row["provider"] for row in found if "eager_p50_us" in row] == ["ours"]
    assert found[3]["left_out"] == "it is on holiday"
    left_out = [words for words in said if "left out" in words]
    assert [words.split()[0] for words in left_out] == ["wrong", "nan", "holiday", "broken"]
    assert "WRONG" in left_out[0]
    assert "1.0e-03" in left_out[0]
    assert "inf" in left_out[1]
    assert "on holiday" in left_out[2]
    assert "ZeroDivisionError: a bug" in left_out[3]


def test_what_does_other_work_is_timed_without_a_check() -> None:
    known = squaring({"ours": square, "less": times(0)}, unlike={"less": "it does not square"})
    found, _ = measure(known, rounds=(1, 1))
    assert found[1]["unlike"] == "it does not square"
    assert found[1]["error"] is None
    assert found[1]["eager_p50_us"] > 0
    assert "unlike" not in found[0]


def test_an_option_chooses_the_gradients_and_holds_its_flags() -> None:
    held: list[str] = []

    @contextlib.contextmanager
    def flags(case: Case) -> Iterator[None]:
        held.append(case.option)
        yield
        held.pop()

    def product(case: Case, i: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: (i["x"] * i["y"]).sum() * len(held)

    known = dataclasses.replace(
        squaring({"ours": product}, flags=flags),
        leaves=("x", "y"),
        leaves_by_option={"y": ("y",)},
    )
    inputs = {"x": torch.tensor([2.0]), "y": torch.tensor([3.0])}
    for option, want in (("", (6, 3, 2)), ("y", (6, 2))):
        case = dataclasses.replace(CASE, option=option)
        copies = {name: t.clone() for name, t in inputs.items()}
        assert bench.bind(known, "ours", case, "fwd+bwd", copies)() == want
    assert not held


def test_a_wrong_gradient_or_shape_is_refused() -> None:
    def detached(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: (inputs["x"] * inputs["x"].detach()).sum()

    def cut(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: (inputs["x"] ** 2)[1:]

    summed = dataclasses.replace(
        squaring({"ours": lambda case, i: lambda: (i["x"] ** 2).sum(), "detached": detached}),
        reference=lambda case, i, mode: ((i["x"].numpy() ** 2).sum(), 2 * i["x"].numpy()),
        known=None,
    )
    found, _ = measure(summed, "fwd+bwd", rounds=(1, 1))
    assert [row["provider"] for row in found if "left_out" not in row] == ["ours"]
    assert "WRONG" in measure(squaring({"cut": cut}), rounds=(1, 1))[0][0]["left_out"]


def test_an_answer_must_be_right_in_small_too() -> None:
    def half(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: inputs["x"] ** 2 * (1 if len(inputs["x"]) > 10 else 2)

    assert "in small 1.0e+00" in measure(squaring({"half": half}), rounds=(1, 1))[0][0]["left_out"]


def test_errors_of_outputs() -> None:
    one = torch.ones(4)
    assert bench.error((one,), (one,)) == 0
    assert bench.error((one, 1.5 * one), (one, one)) == pytest.approx(0.5)
    assert bench.error((one[:3],), (one,)) == float("inf")
    assert bench.error((one / 0,), (one,)) == float("inf")
    assert bench.error((one * 1.0000001,), (one,), exact=True) == float("inf")
    assert bench.error((torch.zeros(0),), (torch.zeros(0),)) == 0


@pytest.mark.parametrize(("sets", "calls"), [(2, 20), (3, 21), (40, 40)])
def test_a_graph_takes_turns_on_its_inputs_and_shares_its_time_among_its_calls(
    monkeypatch: pytest.MonkeyPatch, sets: int, calls: int
) -> None:
    fake = FakeTime()
    device = fake.install(monkeypatch)
    log: list[tuple[int, bool]] = []

    def call(i: int) -> tuple[()]:
        log.append((i, fake.captured is not None))
        fake.work(1.0 + i)
        return ()

    thunks = [functools.partial(call, i) for i in range(sets)]
    sample = timing._graph_sampler(thunks, 20, device)
    assert [i for i, captured in log if not captured] == list(range(min(sets, 3)))
    turns = [i for i, captured in log if captured]
    assert turns == [i % sets for i in range(calls)]
    fake.replays = 0
    assert sample() == pytest.approx(sum(1.0 + i for i in turns) / calls)
    assert fake.replays == 1


def test_a_warm_graph_is_replayed_once_before_the_clock_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTime()
    device = fake.install(monkeypatch)
    sample = timing._graph_sampler([lambda: (fake.work(1.0), ())[1]], 5, device)
    fake.replays = 0
    assert sample() == pytest.approx(1.0)
    assert fake.replays == 2


def test_quantiles_of_the_samples() -> None:
    times = [1e-6 * us for us in (9, 2, 7, 4, 5, 6, 3, 8, 1, 10, 0)]
    row = timing._row(timing.Contender("ours", [], 0.0, 0.0, samples={"eager": times}))
    assert [row[f"eager_{name}_us"] for name in ("p20", "p50", "p80")] == [2, 5, 8]
    assert row["samples"] == 11


def test_inputs_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeTime().install(monkeypatch)
    assert timing._sets(L2_BYTES // 10, device) + 1 == 30
    assert timing._sets(10**9, device) + 1 == 2
    assert timing._sets(1, device) + 1 == timing._SETS
