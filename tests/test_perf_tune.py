"""The tuner, on a clock and a GPU that are made up: what it finds, keeps, refuses and writes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlops_triton import _dispatch, _settings

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")

from dlops_triton.perf import bench, rows, tune
from dlops_triton.perf.bench import Bench, Case
from tests.fakes import FakeTime, squaring

Values = dict[str, int]
Model = Callable[[Values, Case, torch.dtype], float]  # seconds of a call

SPACE = {"BLOCK": (16, 32, 64, 128, 256, 512), "num_warps": (2, 4, 8)}
DEFAULT = {"BLOCK": 64, "num_warps": 4}
SMALL = {"n": 10}
LARGE, TINY = Case("large", {"n": 4000}, SMALL), Case("tiny", {"n": 900}, SMALL)


class Gpu:
    """A made-up GPU with an op whose time depends on its settings, as a test plants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.time = FakeTime()
        self.device = self.time.install(monkeypatch)
        self.folder = folder
        self.compile_s = 0.0
        self.compiled: set[tuple[Any, ...]] = set()
        monkeypatch.setattr(tune, "time", self.time)
        monkeypatch.setattr(_dispatch, "gpu", lambda device: ("Invented GPU", "sm_90"))

    def bench(
        self,
        model: Model,
        cases: tuple[Case, ...] = (LARGE, TINY),
        wrong: Callable[[Values], bool] = lambda values: False,
        **options: Any,
    ) -> Bench:
        def ours(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
            def call() -> Tensor:
                x = inputs["x"]
                values = dict(_settings.ALL["square_fwd"].on(x))
                key = (*values.values(), x.dtype)
                if key not in self.compiled:
                    self.compiled.add(key)
                    self.time.sleep(self.compile_s)
                self.time.work(model(values, case, x.dtype))
                return x**2 * (1.5 if wrong(values) else 1)

            return call

        settings = options.pop("settings", {"square_fwd": SPACE})
        square = squaring({"ours": ours}, cases=cases, settings=settings, **options)
        reference = lambda case, i, mode: (i["x"].float().numpy() ** 2,)  # noqa: E731
        return dataclasses.replace(square, reference=reference)

    def tune(self, *benches: Bench, budget_s: float = 1e6) -> None:
        assert tune.run(benches, self.device, budget_s, self.folder, "abc") == 0

    @property
    def table(self) -> dict[str, Any]:
        return json.loads((self.folder / "invented-gpu.json").read_text())  # type: ignore[no-any-return]

    @property
    def tuned(self) -> dict[str, dict[str, Values]]:
        return self.table["settings"]  # type: ignore[no-any-return]

    @property
    def evidence(self) -> list[rows.Row]:
        return rows.read([self.folder / "tune-invented-gpu.jsonl"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    monkeypatch.setattr(_settings, "ALL", dict(_settings.ALL))
    monkeypatch.setattr(_settings, "folders", [])
    _settings.Settings("square_fwd", fp32=DEFAULT)
    _settings.Settings("square_bwd", fp32=DEFAULT)
    _settings.reload()
    yield Gpu(monkeypatch, tmp_path)
    monkeypatch.undo()
    _settings.reload()


def valley(block: int, num_warps: int) -> Model:
    """Fastest at these settings, and a fifth slower for each doubling or halving."""

    def seconds(values: Values, case: Case, dtype: torch.dtype) -> float:
        off = abs(math.log2(values["BLOCK"] / block)) + abs(
            math.log2(values["num_warps"] / num_warps)
        )
        return 1e-7 * case.sizes["n"] * 1.2**off

    return seconds


# --- decisions --------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [True, False])
def test_it_finds_the_planted_best_for_each_size_of_input(gpu: Gpu, capturable: bool) -> None:
    half, single = valley(512, 2), valley(128, 8)

    def both(values: Values, case: Case, dtype: torch.dtype) -> float:
        return (single if dtype == torch.float32 else half)(values, case, dtype)

    gpu.tune(gpu.bench(both, capturable=capturable))
    assert gpu.tuned == {
        "square_fwd": {
            "2": {"BLOCK": 512, "num_warps": 2},
            "4": {"BLOCK": 128, "num_warps": 8},
        }
    }


def test_the_launcher_reads_what_was_written_and_the_evidence_says_why(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.tune(gpu.bench(valley(128, 8), cases=(LARGE,)))
    monkeypatch.setattr(_settings, "folders", [gpu.folder])
    _settings.reload()
    best = {"BLOCK": 128, "num_warps": 8}
    assert _settings.ALL["square_fwd"].on(torch.empty(0)) == best
    assert _settings.ALL["square_fwd"].on(torch.empty(0, dtype=torch.float64)) == DEFAULT
    assert {key: gpu.table[key] for key in ("gpu", "target", "commit")} == {
        "gpu": "Invented GPU",
        "target": "sm_90",
        "commit": "abc",
    }
    assert {"date", "torch", "triton"} < set(gpu.table)

    assert len(gpu.evidence) == 2 * len(SPACE["BLOCK"]) * len(SPACE["num_warps"])
    (chosen,) = (row for row in gpu.evidence if row["chosen"] and row["dtype"] == "fp32")
    (default,) = (row for row in gpu.evidence if row["default"] and row["dtype"] == "fp32")
    assert {
        "kind": "tuned",
        "op": "square",
        "case": "large",
        "mode": "fwd",
    }.items() <= chosen.items()
    assert {"gpu", "driver", "target", "commit", "date", "torch", "command"} <= set(chosen)
    assert (chosen["candidate"], default["candidate"]) == (best, DEFAULT)
    assert chosen["p20_us"] == chosen["p50_us"] == chosen["p80_us"] == pytest.approx(400)
    assert default["p50_us"] == pytest.approx(400 * 1.2**2)
    assert chosen["ratio"] == pytest.approx(1.2**-2, abs=1e-4)
    assert chosen["samples"] == default["samples"] == tune._LAST[1]
    assert not any(row["refused"] for row in gpu.evidence)


@pytest.mark.parametrize(("gain", "wins"), [(0.95, False), (0.7, True)])
def test_only_what_beats_the_spread_replaces_the_present_settings(
    gpu: Gpu, gain: float, wins: bool
) -> None:
    """One sample in two takes a fifth longer: five per cent less time prove nothing."""
    calls = 0

    def noisy(values: Values, case: Case, dtype: torch.dtype) -> float:
        nonlocal calls
        calls += 1
        # Turns of four, so that either of two that take turns meets both.
        return 1e-3 * (gain if values["BLOCK"] == 128 else 1) * (1.2 if calls % 4 < 2 else 1)

    gpu.tune(gpu.bench(noisy, cases=(LARGE,), capturable=False))
    for size in ("2", "4"):
        assert gpu.tuned["square_fwd"][size]["BLOCK"] == (128 if wins else 64)
    chosen = [row for row in gpu.evidence if row["chosen"]]
    assert [row["default"] for row in chosen] == [not wins] * 2


def test_luck_in_the_search_is_not_enough(gpu: Gpu) -> None:
    lucky = {"BLOCK": 256, "num_warps": 4}
    rounds = 0

    def model(values: Values, case: Case, dtype: torch.dtype) -> float:
        nonlocal rounds
        if values != lucky:
            return 1e-3
        rounds += case.sizes == SMALL  # which is run once, to check the answer
        return 0.5e-3 if rounds < 3 else 1.1e-3

    gpu.tune(gpu.bench(model, cases=(dataclasses.replace(LARGE, dtypes=("fp32",)),)))
    assert rounds == 3  # of 17, of 5, and the last
    assert gpu.tuned["square_fwd"]["4"] == DEFAULT
    (row,) = (row for row in gpu.evidence if row["candidate"] == lucky)
    assert row["ratio"] == pytest.approx(1.1)
    assert row["samples"] == tune._LAST[1]


def test_cases_are_judged_together_by_the_geometric_mean(gpu: Gpu) -> None:
    """Half the time in one case is worth as much as twice the time in another; 1.9 times, less."""

    def model(values: Values, case: Case, dtype: torch.dtype) -> float:
        if values["BLOCK"] == 128:
            return {"large": 1.9, "tiny": 0.5}[case.name]
        if values["BLOCK"] == 256:
            return {"large": 2.1, "tiny": 0.5}[case.name]
        return 1.0

    gpu.tune(gpu.bench(model))
    assert gpu.tuned["square_fwd"]["4"]["BLOCK"] == 128


def test_what_fails_or_is_wrong_is_refused_with_the_reason(gpu: Gpu) -> None:
    def model(values: Values, case: Case, dtype: torch.dtype) -> float:
        if values["BLOCK"] == 512:
            raise RuntimeError("out of resource: shared memory")
        return 1e-6 / values["BLOCK"]

    gpu.tune(gpu.bench(model, wrong=lambda values: values["BLOCK"] == 256))
    assert gpu.tuned["square_fwd"]["4"]["BLOCK"] == 128
    reasons = {row["candidate"]["BLOCK"]: row["refused"] for row in gpu.evidence}
    assert reasons[512] == "RuntimeError: out of resource: shared memory"
    assert "RefusedError: WRONG" in reasons[256]
    assert reasons[128] is reasons[64] is None
    refused = [row for row in gpu.evidence if row["refused"]]
    assert all(row["p50_us"] is None and not row["chosen"] for row in refused)


def test_where_no_others_work_the_present_settings_stay(gpu: Gpu) -> None:
    gpu.tune(gpu.bench(valley(64, 4), wrong=lambda values: values != DEFAULT))
    assert gpu.tuned["square_fwd"] == {"2": DEFAULT, "4": DEFAULT}


def test_a_fault_that_takes_the_gpu_with_it_ends_the_run(gpu: Gpu) -> None:
    faulty = False

    def model(values: Values, case: Case, dtype: torch.dtype) -> float:
        nonlocal faulty
        faulty |= dtype == torch.float32 and values["BLOCK"] == 128
        if faulty:
            raise RuntimeError("an illegal memory access was encountered")
        return valley(128, 8)(values, case, dtype)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.tune(gpu.bench(model, capturable=False))
    assert gpu.tuned == {"square_fwd": {"2": {"BLOCK": 128, "num_warps": 8}}}


# --- what is measured -------------------------------------------------------------------------


def test_a_setting_is_judged_in_the_first_mode_and_by_the_cases_that_launch_with_it(
    gpu: Gpu,
) -> None:
    square = gpu.bench(valley(64, 4), cases=(LARGE, TINY), settings={"square_bwd": SPACE})

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            gpu.time.work(1e-5)
            return x**2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            if x.numel() > 1000:
                values = dict(_settings.ALL["square_bwd"].on(x))
                gpu.time.work(valley(256, 4)(values, LARGE, x.dtype))
            return 2 * x * grad

    def ours(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        return lambda: Backward.apply(inputs["x"]).sum()  # type: ignore[no-any-return, no-untyped-call]

    summed: dict[str, Any] = {
        "providers": {"ours": ours, "eager": lambda case, i: lambda: (i["x"] ** 2).sum()},
        "known": None,
        "make": lambda case, dtype, device: {"x": torch.linspace(0, 1, case.sizes["n"]).to(dtype)},
        "reference": lambda case, i, mode: (
            (i["x"].double().numpy() ** 2).sum(),
            *([2 * i["x"].double().numpy()] * (mode != "fwd")),
        ),
    }
    gpu.tune(dataclasses.replace(square, **summed))
    assert gpu.tuned["square_bwd"]["4"] == {"BLOCK": 256, "num_warps": 4}
    assert {(row["case"], row["mode"]) for row in gpu.evidence} == {("large", "fwd+bwd")}


def test_a_setting_that_no_case_launches_with_is_left_as_it_is(
    gpu: Gpu, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.tune(gpu.bench(valley(64, 4), settings={"square_bwd": SPACE, "square_fwd": SPACE}))
    assert set(gpu.tuned) == {"square_fwd"}
    printed = capsys.readouterr()
    assert "square_bwd, 4 bytes: not tuned: no case" in printed.out + printed.err


def test_a_case_that_cannot_be_measured_is_left_out(
    gpu: Gpu, capsys: pytest.CaptureFixture[str]
) -> None:
    def model(values: Values, case: Case, dtype: torch.dtype) -> float:
        if case.name == "large":
            raise torch.OutOfMemoryError("4 GB are not there")
        return valley(32, 4)(values, case, dtype)

    gpu.tune(gpu.bench(model))
    assert gpu.tuned["square_fwd"]["4"] == {"BLOCK": 32, "num_warps": 4}
    assert {row["case"] for row in gpu.evidence} == {"tiny"}
    printed = capsys.readouterr()
    assert "large bf16 left out: OutOfMemoryError: 4 GB" in printed.out + printed.err


def test_the_present_settings_are_those_that_count_on_this_gpu(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Here those of another GPU of its architecture, which stay; the defaults are a candidate."""
    shipped = tmp_path_factory.mktemp("shipped")
    other = {"BLOCK": 128, "num_warps": 8}
    content = {"gpu": "Other", "target": "sm_90", "settings": {"square_fwd": {"4": other}}}
    (shipped / "other.json").write_text(json.dumps(content))
    monkeypatch.setattr(_settings, "folders", [shipped])
    space = {"BLOCK": (128, 256), "num_warps": (8,)}
    gpu.tune(gpu.bench(valley(128, 8), settings={"square_fwd": space}))
    assert gpu.tuned["square_fwd"]["4"] == other
    assert _settings.folders == [shipped]
    single = [row for row in gpu.evidence if row["dtype"] == "fp32" and row["case"] == "tiny"]
    assert [row["candidate"] for row in single if row["default"]] == [other]
    tried = [row["candidate"] for row in single if not row["default"]]
    assert tried == [{"BLOCK": 256, "num_warps": 8}, DEFAULT]  # the nearest first


def test_each_decision_holds_for_the_next_and_stays_beside_later_ones(gpu: Gpu) -> None:
    def model(values: Values, case: Case, dtype: torch.dtype) -> float:
        second = dict(_settings.ALL["square_bwd"].on(torch.empty(0, dtype=dtype)))
        # The second's best is whatever the first has.
        follows = valley(values["BLOCK"], 4)(second, case, dtype)
        return 10 * valley(128, 4)(values, case, dtype) + follows

    both = {"square_fwd": SPACE, "square_bwd": SPACE}
    gpu.tune(gpu.bench(model, cases=(LARGE,), settings=both))
    best = {"BLOCK": 128, "num_warps": 4}
    assert gpu.tuned == {name: {"2": best, "4": best} for name in both}
    gpu.tune(gpu.bench(valley(256, 4), cases=(LARGE,)))
    assert gpu.tuned["square_fwd"]["4"]["BLOCK"] == 256
    assert gpu.tuned["square_bwd"] == {"2": best, "4": best}


# --- budget and interruption ------------------------------------------------------------------


@pytest.mark.parametrize(("budget_s", "enough"), [(30.0, False), (60.0, False), (500.0, True)])
def test_the_budget_is_kept(gpu: Gpu, budget_s: float, enough: bool) -> None:
    gpu.compile_s = 1.5
    gpu.tune(gpu.bench(valley(128, 4)), budget_s=budget_s)
    # The last thing begun in time is brought to its end.
    assert gpu.time.host <= budget_s + 5
    untried = [row for row in gpu.evidence if row["refused"] == "not tried: the time was up"]
    assert bool(untried) is not enough
    # The nearest are tried first, so that even the shortest search finds its neighbour.
    assert gpu.tuned["square_fwd"]["4"] == {"BLOCK": 128, "num_warps": 4}


def test_without_time_nothing_is_decided(gpu: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.tune(gpu.bench(valley(128, 4)), budget_s=0.0)
    assert not list(gpu.folder.iterdir())
    assert "The budget is spent: 2 settings were not tuned" in "".join(capsys.readouterr())
    gpu.compile_s = 10.0
    gpu.tune(gpu.bench(valley(128, 4)), budget_s=1.0)
    assert not list(gpu.folder.iterdir())
    assert "there was no time to try other settings" in "".join(capsys.readouterr())


def test_an_interrupted_run_keeps_what_was_decided(
    gpu: Gpu, capsys: pytest.CaptureFixture[str]
) -> None:
    def model(values: Values, case: Case, dtype: torch.dtype) -> float:
        if dtype == torch.float32 and values["BLOCK"] == 16:
            raise KeyboardInterrupt
        return valley(128, 4)(values, case, dtype)

    gpu.tune(gpu.bench(model))
    assert gpu.tuned == {"square_fwd": {"2": {"BLOCK": 128, "num_warps": 4}}}
    assert {row["dtype"] for row in gpu.evidence} == {"bf16"}
    assert "Interrupted" in "".join(capsys.readouterr())
