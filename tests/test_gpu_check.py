"""`make gpu-check`, with steps that stand in for the real ones, and what it reads from output."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlops_triton import _dispatch, kernels

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")

from dlops_triton.perf import cli, gpu_check, rows, sanitize
from dlops_triton.perf.gpu_check import Result, Step

WHERE = dict.fromkeys(("driver", "torch", "triton", "commit"), "1.2") | {
    "gpu": "NVIDIA H200",
    "date": "2026-11-25T00:00:00+00:00",
}


def step(name: str, code: str, limit_s: float = 20.0, **options: Any) -> Step:
    """A step that runs a few lines of Python."""
    options = {"log": "steps.log", "read": gpu_check.last_line} | options
    return Step(name, (sys.executable, "-S", "-c", code), limit_s, **options)


def results(out: Path) -> list[Result]:
    return [Result(**r) for r in json.loads((out / "summary.json").read_text())["steps"]]


# --- the steps -------------------------------------------------------------------------------


def test_it_goes_on_after_a_failure_and_sums_up_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = [
        step("one", "print('a'); print('b')"),
        step("two", "print('almost'); raise SystemExit('went wrong')"),
        step("three", "", skipped="it is not here"),
        Step("four", (str(tmp_path / "absent"),), 20.0, "steps.log", gpu_check.last_line),
        step("five", "import sys; sys.stdout.write('0 %\\r100 %\\rdone')", log="other.log"),
    ]
    made = tmp_path / "made"
    made.mkdir()
    (made / "report of (all).html").write_text("report")
    out, wanted = tmp_path / "deep" / "out", (made / "report of (all).html", made / "never made")
    assert gpu_check.check(todo, out, wanted, WHERE) == 1
    found = results(out)
    assert [r.step for r in found] == ["one", "two", "three", "four", "five"]
    assert [r.outcome for r in found] == ["ok", "failed", "skipped", "failed", "ok"]
    assert [r.says for r in found[:3]] == ["b", "went wrong", "it is not here"]
    assert "No such file" in found[3].says
    assert found[4].says == "done"
    assert {file.name for file in out.iterdir()} == {
        *("summary.txt", "summary.json", "steps.log", "other.log", "report-of--all-.html"),
    }
    log = (out / "steps.log").read_text()
    assert log.index("$ ") < log.index("a\nb\n") < log.index("almost\nwent wrong")
    said = capsys.readouterr().out
    summary = (out / "summary.txt").read_text()
    assert said.endswith(f"\n{summary}")
    assert "gpu: NVIDIA H200" in summary
    assert re.search(r"^two +failed +\d+\.\d  went wrong$", summary, re.M)


def test_nothing_failed_is_success_and_old_logs_are_not_kept(tmp_path: Path) -> None:
    todo = [step("one", "print('fine')"), step("two", "", skipped="it is not here")]
    for _ in range(2):
        assert gpu_check.check(todo, tmp_path, (), WHERE) == 0
    assert (tmp_path / "steps.log").read_text().count("fine\n") == 1


def ends(pid: int) -> bool:
    """Is a process gone, or soon? A dead one may wait for a parent that never asks."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_step_that_hangs_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.3)
    hang = (
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    status = gpu_check.check(
        [step("hangs", hang, limit_s=1.5), step("next", "print(1)")], tmp_path, (), WHERE
    )
    assert time.monotonic() - start < 15
    hung, after = results(tmp_path)
    assert (status, hung.outcome, after.outcome) == (1, "timed out", "ok")
    child = re.fullmatch(r"after 2 s; (\d+)", hung.says)
    assert child is not None
    assert ends(int(child[1]))


def test_children_that_a_step_leaves_behind_are_killed(tmp_path: Path) -> None:
    leave = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    found = gpu_check.take(step("leaves", leave), tmp_path / "log", 20.0)
    assert found.outcome == "ok"
    assert ends(int(found.says))


def test_a_step_may_say_what_it_has_when_its_time_is_up(tmp_path: Path) -> None:
    patient = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('half of it')"
    )
    found = gpu_check.take(step("patient", patient), tmp_path / "log", 1.5)
    assert (found.outcome, found.says) == ("timed out", "after 2 s; half of it")


def test_the_total_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.2)
    todo = [step(str(i), "import time; time.sleep(60)") for i in range(3)]
    start = time.monotonic()
    assert gpu_check.check(todo, tmp_path, (), WHERE, total_s=2.5) == 1
    assert time.monotonic() - start < 15
    first, *others = results(tmp_path)
    assert (first.outcome, first.says[:9]) == ("timed out", "after 2 s")
    assert [(r.outcome, r.says) for r in others] == [("skipped", "no time was left")] * 2


def test_steps_leave_the_later_ones_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.2)
    hangs = step("hangs", "import time; time.sleep(60)", limit_s=30.0)
    last = step("last", "print('done')", needs_s=10.0)
    assert gpu_check.check([hangs, last], tmp_path, (), WHERE, total_s=12.0) == 1
    first, second = results(tmp_path)
    assert (first.outcome, first.says[:9]) == ("timed out", "after 2 s")
    assert (second.outcome, second.says) == ("ok", "done")


def test_interrupted_it_still_sums_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(status: int, said: str) -> gpu_check.Reading:
        raise KeyboardInterrupt

    todo = [step("one", "print(1)"), step("two", "", read=interrupt), step("three", "")]
    assert gpu_check.check(todo, tmp_path, (), WHERE) == 1
    assert [r.step for r in results(tmp_path)] == ["one", "the rest"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("the rest")


def test_steps_find_the_library_and_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("KEPT", "kept")
    names = ("TRITON_INTERPRET", "PYTHONPATH", "KEPT", "GIVEN")
    code = f"import os; print([os.environ.get(name) for name in {names}], os.getcwd())"
    found = gpu_check.take(step("says", code, environment={"GIVEN": "a"}), tmp_path / "log", 20.0)
    path = f"{rows.ROOT}{os.pathsep}/somewhere"
    assert found.says == f"{[None, path, 'kept', 'a']} {rows.ROOT}"


# --- the real ones, on a machine without a GPU -----------------------------------------------


def real(tmp_path: Path, commit: str | None = None) -> list[Step]:
    return gpu_check.steps(tmp_path / "nvidia-h200.jsonl", tmp_path, WHERE["date"], commit)


def test_without_a_gpu_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu_check.main([]) == 2
    assert "No GPU found" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_whole_leaves_eight_files_and_passes_the_commit_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps in their order, each of which does no more than make its files."""
    asked: list[str | None] = []
    actual = gpu_check.steps

    def steps(results: Path, made: Path, since: str, commit: str | None) -> list[Step]:
        asked.append(commit)
        results.parent.mkdir(exist_ok=True)
        results.write_text("{}\n")
        for name in ("report.html", "report.md", "a.png", "roofline-nvidia-h200.png"):
            (made / name).write_text("")
        todo = actual(results, made, since, commit)
        return [step(s.name, f"print({s.name!r})", log=s.log) for s in todo]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "steps", steps)
    where = {"gpu": "NVIDIA H200", "driver": None}
    monkeypatch.setattr(gpu_check.machine, "gpu", lambda device: where)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("COMMIT", "0123abcd")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_check.main([]) == 0
        assert gpu_check.main(["--commit", "fedc"]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert asked == ["0123abcd", "fedc"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("summary.txt", "summary.json", "tests.log", "sanitizer.log", "perf.log"),
        *("nvidia-h200.jsonl", "report.html", "roofline-nvidia-h200.png"),
    }
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["commit"] == "fedc"


def test_the_steps_are_in_order_and_the_lab_takes_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    todo = {s.name: s for s in real(tmp_path, "abc")}
    assert list(todo) == ["tests", "memcheck", "racecheck", "probe", "run", "report", "plot"]
    assert todo["memcheck"].command[:3] == ("/opt/compute-sanitizer", "--tool", "memcheck")
    assert todo["racecheck"].command[:3] == ("/opt/compute-sanitizer", "--tool", "racecheck")
    assert todo["memcheck"].command[-2:] == ("-m", "dlops_triton.perf.sanitize")
    assert todo["memcheck"].limit_s + todo["racecheck"].limit_s <= 90
    caches = {todo[name].environment["TRITON_CACHE_DIR"] for name in ("tests", "run")}
    assert not any(Path(cache).exists() for cache in caches)
    assert not todo["tests"].skipped
    for name in ("probe", "run", "report", "plot"):
        command = list(todo[name].command)
        assert command[1:4] == ["-m", "dlops_triton.perf", name]
        options = vars(cli._parser().parse_args(command[3:]))
        assert options.get("commit", "abc") == "abc"
    assert "--commit" not in real(tmp_path)[3].command


def test_the_sanitizer_is_found_or_its_steps_say_that_it_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    for variable, value in (("PATH", tool.parent), ("CUDA_HOME", tmp_path)):
        with monkeypatch.context() as patch:
            patch.setenv("PATH", "/nowhere")
            patch.setenv(variable, str(value))
            assert gpu_check.find_sanitizer() == str(tool)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    skipped = [gpu_check.take(s, tmp_path / "log", 9.0) for s in real(tmp_path) if s.skipped]
    assert [r.step for r in skipped] == ["memcheck", "racecheck"]
    assert {(r.outcome, r.says) for r in skipped} == {("skipped", "compute-sanitizer is not here")}


def test_the_sanitizer_sees_every_kernel(
    kernel: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    every = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    launched: set[str] = set()
    launch: Callable[..., None] = _dispatch.launch

    def noted(function: Any, *args: Any, **settings: Any) -> None:
        launched.add(function.fn.__name__)
        launch(function, *args, **settings)

    monkeypatch.setattr(_dispatch, "launch", noted)
    sanitize.calls(kernel)
    assert launched == every
    assert len(every) >= 7


# --- what is read ----------------------------------------------------------------------------

PYTEST = """\
bringing up nodes...
........................................F...................s....E....... [ 64%]
=================================== FAILURES ===================================
____________________________ test_iou[kernel-33-17] ____________________________
>       assert 4 passed in 0.1s
ERROR    root:iou.py:12 a line of a log
=========================== short test summary info ============================
FAILED tests/test_iou.py::test_iou[kernel-33-17] - AssertionError: 1 - 2
FAILED tests/test_nms.py::TestTies::test_order[a b] - RuntimeError: Triton Erro...
ERROR tests/test_perf.py - ModuleNotFoundError: No module named 'tqdm'
2 failed, 812 passed, 3 skipped, 1 error in 141.22s (0:02:21)
"""


def test_reading_pytest() -> None:
    assert gpu_check.read_pytest(1, PYTEST) == (
        False,
        "2 failed, 812 passed, 3 skipped, 1 error: test_iou[kernel-33-17], "
        "TestTies::test_order[a b], tests/test_perf.py",
    )
    decorated = "............ [100%]\n===== 12 passed, 1 xfailed, 2 warnings in 3.10s =====\n"
    assert gpu_check.read_pytest(0, decorated) == (True, "12 passed, 1 xfailed")
    assert gpu_check.read_pytest(5, "\nno tests ran in 0.01s\n") == (False, "no tests ran in 0.01s")
    absent = "ERROR: file or directory not found: tests"
    assert gpu_check.read_pytest(4, f"{absent}\n\n") == (False, absent)
    many = "short test summary info ===\n" + "".join(f"FAILED a.py::t{i} - E\n" for i in range(8))
    assert gpu_check.read_pytest(1, f"{many}8 failed in 1.00s") == (
        False,
        "8 failed: t0, t1, t2, t3, t4, and 3 more",
    )


def test_reading_what_pytest_says_today(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('word', ['a b', 'c'])\n"
        "def test_word(word):\n    assert word == 'c'\n"
        "@pytest.mark.skip(reason='why not')\n"
        "def test_skipped():\n    pass\n"
    )
    command = (sys.executable, "-m", "pytest", str(tmp_path), "-q", "-p", "no:cacheprovider")
    tests = Step("tests", (*command, "-c", os.devnull), 60.0, "log", gpu_check.read_pytest)
    found = gpu_check.take(tests, tmp_path / "log", 60.0)
    assert (found.outcome, found.says) == (
        "failed",
        "1 failed, 1 passed, 1 skipped: test_word[a b]",
    )


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at nms_mask_kernel+0x2f0 in nms.py:52
=========     Address 0x7f3c1a001454 is out of bounds
=========
========= Invalid __global__ write of size 1 bytes
=========     at nms_resolve_kernel+0x9a0 in nms.py:131
every call came back
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
every call came back
========= Error: Race reported between Write access at nms_resolve_kernel+0x6c0 in nms.py:125
=========     and Read access at nms_resolve_kernel+0x710 in nms.py:126 [512 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_reading_the_sanitizer() -> None:
    read = gpu_check.read_sanitizer
    clean = f"========= COMPUTE-SANITIZER\n{sanitize.DONE}\n========= ERROR SUMMARY: 0 errors\n"
    assert read(0, clean) == (True, "0 errors")
    assert read(9, MEMCHECK) == (
        False,
        "2 errors; first: Invalid __global__ read of size 4 bytes at nms_mask_kernel+0x2f0 in "
        "nms.py:52",
    )
    assert read(0, MEMCHECK)[0] is False
    assert read(0, clean.replace("0 errors", "10 errors")) == (False, "10 errors")
    well, says = read(9, RACECHECK)
    assert not well
    assert says.startswith("1 hazard displayed (1 error, 0 warnings); first: Error: Race reported")
    none = "0 hazards displayed (0 errors, 0 warnings)"
    assert read(0, f"{sanitize.DONE}\n========= RACECHECK SUMMARY: {none}\n") == (True, none)
    assert read(0, "========= ERROR SUMMARY: 0 errors\n")[0] is False
    assert read(1, clean)[0] is False
    assert read(255, "========= Error: no device\n\n") == (False, "========= Error: no device")


def test_reading_the_labs_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    before, since, after = (f"2026-11-25T0{hour}:00:00+00:00" for hour in (1, 2, 3))

    def read(status: int = 0, said: str = "table") -> gpu_check.Reading:
        return gpu_check.read_rows(status, said, file, since)

    assert read() == (False, "table")
    rows.append(file, [{"kind": "measured", "date": before}, {"kind": "probe", "date": after}])
    rows.append(file, [{"kind": "measured", "date": after, "left_out": "it is on holiday"}])
    assert read() == (False, "measured: 0, left out: 1")
    rows.append(file, [{"kind": "measured", "date": date} for date in (since, after)])
    spent = "The budget of 120 s is spent: 3 of 9 cases were not measured."
    assert read(said=f"{spent}\ntable") == (True, f"measured: 2, left out: 1; {spent}")
    assert read(1, "Traceback\nKeyError: 'x'") == (False, "KeyError: 'x'")
