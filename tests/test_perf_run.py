"""A run: what it keeps, when it ends, what it does not repeat, and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")

from dlops_triton.perf import __main__ as entry
from dlops_triton.perf import bench, cli, compare, machine, rows, run, static, tune
from dlops_triton.perf.bench import Bench, Case, Job
from dlops_triton.perf.gpus import GPUS
from tests.fakes import CASE, FakeTime, absent, planted, square, squaring, times

CPU = torch.device("cpu")
CASES = tuple(dataclasses.replace(CASE, name=name, modes=("fwd",)) for name in "abcdef")
WHERE = {"gpu": "Invented GPU", "driver": "1", "target": "sm_90"}
ROOFS = {"copy_bytes_per_s": 4e12, "instructions_per_s": 3e13}


@pytest.fixture(autouse=True)
def invented_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu", lambda device: dict(WHERE))
    monkeypatch.setattr(machine, "roofs", lambda device, say: dict(ROOFS))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def all_of(known: Bench) -> list[Job]:
    return bench.jobs([known], ["fp32"])


def measured(file: Path) -> list[rows.Row]:
    return [row for row in rows.read_all(file) if row["kind"] == "measured"]


def test_a_row_has_all_that_it_takes_to_believe_and_repeat_it(file: Path) -> None:
    known = squaring({"ours": square, "wrong": times(2), "holiday": absent}, CASES[:1])
    found = run.run(all_of(known), CPU, file, commit="abc")
    probe, *kept = rows.read_all(file)
    assert probe["kind"] == "probe"
    assert probe["roofs"] == ROOFS
    assert kept == found
    ours, wrong, holiday = found
    assert ours.items() >= (WHERE | {"kind": "measured", "commit": "abc", "dtype": "fp32"}).items()
    assert (ours["op"], ours["case"], ours["mode"]) == ("square", "a", "fwd")
    assert (ours["bytes"], ours["operations"], ours["sizes"]) == (8000, 1000, {"n": 1000})
    assert ours["roofs"] == ROOFS
    assert {"date", "command", "torch", "triton", "first_call_s", "samples"} <= set(ours)
    assert "WRONG" in wrong["left_out"]
    assert holiday["left_out"] == "it is on holiday"
    assert "eager_p50_us" not in wrong
    table = run.table(found)
    assert "square a fp32 fwd" in table
    assert "left out: it is on holiday" in table


def test_an_interrupted_run_keeps_what_it_measured(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = squaring({"ours": interrupting("c", KeyboardInterrupt)}, CASES)
    found = run.run(all_of(known), CPU, file)
    assert [row["case"] for row in measured(file)] == ["a", "b"] == [row["case"] for row in found]
    assert "Interrupted: 4 of 6 cases were not measured" in capsys.readouterr().out


def test_an_interrupt_that_a_peer_turns_into_a_failure_is_one(file: Path) -> None:
    def swallowing(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("the capture failed")  # noqa: B904 - as a __exit__ does

    found = run.run(all_of(squaring({"ours": square, "peer": swallowing}, CASES)), CPU, file)
    assert found == measured(file) == []


def interrupting(name: str, error: type[BaseException]) -> bench.Provider:
    def bind(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        if case.name == name:
            raise error
        return lambda: inputs["x"] ** 2

    return bind


def test_resuming_repeats_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted = squaring({"ours": interrupting("c", KeyboardInterrupt), "no": absent}, CASES)
    run.run(all_of(interrupted), CPU, file, commit="abc")
    seen: list[str] = []

    def noted(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        seen.append(case.name)
        return lambda: inputs["x"] ** 2

    jobs = all_of(squaring({"ours": noted, "no": absent}, CASES))
    run.run(jobs, CPU, file, resume=True, commit="abc")
    assert set(seen) == set("cdef")
    assert "2 of 6 cases are in" in capsys.readouterr().out
    assert len(measured(file)) == 2 * len(CASES)
    before = file.read_bytes()
    assert run.run(jobs, CPU, file, resume=True, commit="abc") == []
    assert file.read_bytes() == before
    # Other code is other work.
    run.run(jobs, CPU, file, resume=True, commit="def")
    assert len(measured(file)) == 4 * len(CASES)


@pytest.mark.parametrize("call_s", [1e-4, 1e-3, 1e-2, 0.1])
def test_a_run_ends_with_its_budget_and_keeps_whole_cases(
    call_s: float, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeTime()
    device = fake.install(monkeypatch)
    monkeypatch.setattr(run, "time", fake)
    monkeypatch.setattr(run, "deadline", fake.deadline)
    providers = {"ours": planted(fake, call_s, call_s), "peer": planted(fake, call_s, 3 * call_s)}
    cases = [dataclasses.replace(case, name=f"{case.name}{i}") for i in range(8) for case in CASES]
    jobs = all_of(squaring(providers, tuple(cases)))
    run.run(jobs, device, file, budget_s=60)
    assert fake.host <= 60
    kept = measured(file)
    if len(kept) < 2 * len(jobs):
        assert fake.host == 60
        assert "The budget of 60 s is spent" in capsys.readouterr().out
    assert [row["provider"] for row in kept] == ["ours", "peer"] * (len(kept) // 2)
    assert kept


def test_a_budget_ends_a_run_whatever_it_waits_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A third alarm must not meet the cleaning up, where hypothesis watches the collector.
    monkeypatch.setattr(run, "_AGAIN_S", 3.0)

    def sleeper(case: Case, inputs: bench.Inputs) -> Callable[[], Tensor]:
        if case.name == "b":
            with contextlib.suppress(BaseException):
                time.sleep(60)
            time.sleep(60)  # no handler of failures may keep the alarm
        return lambda: inputs["x"] ** 2

    begin = time.monotonic()
    run.run(all_of(squaring({"ours": square, "peer": sleeper}, CASES)), CPU, file, budget_s=2.0)
    assert time.monotonic() - begin < 10
    assert [row["case"] for row in measured(file)] == ["a", "a"]
    assert "5 of 6 cases were not measured" in capsys.readouterr().out


def test_less_budget_means_fewer_samples() -> None:
    assert run._share(None, 5, 4) == run.SHARE_S
    assert run._share(1e6, 5, 4) == run.SHARE_S
    assert run._share(40, 5, 4) == pytest.approx(1.0)


# --- command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["run"], ["plot"], ["report"], ["tune"], ["probe"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    assert "usage: python -m dlops_triton.perf" in capsys.readouterr().out


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("run", "tune"):
        assert cli.main([command, "fokal"]) == 2
        assert (
            "no such op: fokal; there are focal, softmax_focal, ghm, iou, iou_loss, match, nms, "
            "soft_nms, deform" in capsys.readouterr().out
        )
    empty = str(tmp_path / "empty.jsonl")
    Path(empty).touch()
    for command in ("plot", "report"):
        assert cli.main([command, empty, "--out", str(tmp_path)]) == 2
        assert "no result rows" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [Path(empty)]


def test_missing_files_and_an_interrupt_are_no_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for of in ("plot", "report"):
        assert cli.main([of, str(tmp_path / "none.jsonl")]) == 2
        assert f"no such file: {tmp_path / 'none.jsonl'}" in capsys.readouterr().out

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(static, "run", interrupted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["run"]) == 130


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert entry.main() == 2
    assert "perf needs tqdm and matplotlib: pip install" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the command line asks of the modules behind it."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str, result: Any) -> Callable[..., Any]:
        return lambda *arguments: (calls.append((name, *arguments)), result)[1]

    monkeypatch.setattr(static, "run", note("static", 0))
    monkeypatch.setattr(run, "run", note("run", []))
    monkeypatch.setattr(compare, "run", note("compare", 0))
    monkeypatch.setattr(tune, "run", note("tune", 0))
    return calls


def test_a_run_without_a_gpu_is_the_static_report(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["run", "nms", "--dtype", "fp32", "--gpu", "A100", "--cases", "full"]) == 0
    ((name, benches, dtypes, cases, gpus, *_),) = asked
    assert (name, [b.name for b in benches], dtypes, cases) == (
        "static",
        ["nms"],
        ("fp32",),
        "full",
    )
    assert [gpu.target for gpu in gpus] == ["sm_80"]
    cli.main(["run", "--gpu", "all"])
    assert [gpu.target for gpu in asked[1][4]] == [g.target for g in GPUS.values()]
    assert cli.main(["run", "--base", "main"]) == 2
    assert cli.main(["probe"]) == 0
    assert "Nothing here was measured" in capsys.readouterr().out


def test_what_a_run_on_a_gpu_is_given(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = ["--out", "rows.jsonl", "--commit", "abc", "--budget", "60"]
    cli.main(["run", "iou", "--cases", "small", "--dtype", "fp32", "--resume", *out])
    cli.main(["run", "iou", "--base", "main", "--budget", "9"])
    cli.main(["tune", "nms", *out])
    (_, jobs, device, *options), compared, tuned = asked
    assert {case.name for _, case, _, _ in jobs} == {"256x256", "512x512"}
    assert device.type == "cuda"
    assert options == [Path("rows.jsonl"), 60.0, True, "abc"]
    assert (compared[0], compared[2], compared[4]) == ("compare", "main", 9.0)
    assert [b.name for b in tuned[1]] == ["nms"]
    assert tuned[3:] == (60.0, Path("rows.jsonl"), "abc")


def test_the_cases_of_real_networks_come_first() -> None:
    jobs = bench.jobs([bench.load("focal"), bench.load("nms")], ["fp32"], "full")
    real = [case in known.cases for known, case, _, _ in jobs]
    assert real == sorted(real, reverse=True)
    assert {dtype for _, _, dtype, _ in jobs} == {"fp32"}
    assert len(jobs) == len(set(map(str, jobs)))
    names = [(known.name, case.name, mode) for known, case, _, mode in jobs]
    assert len(names) == len(set(names))
