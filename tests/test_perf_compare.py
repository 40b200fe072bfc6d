"""`run --base`: a real comparison of two commits of a small repository, and its arithmetic."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")
if shutil.which("git") is None:
    pytest.skip("needs git", allow_module_level=True)

from dlops_triton.perf import bench, compare, rows

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]

# What the base's library does other than the present one.
PLANTED = """
import functools, os, time

def _planted(op):
    def around(plant):
        return functools.wraps(op)(lambda *args, **options: plant(op(*args, **options)))
    return around

def _slowly(out):
    time.sleep(0.03)
    return out

def _die(out):
    print("an answer that is none", flush=True)
    os.write(2, b"planted end")
    os._exit(3)

box_iou = _planted(box_iou)(_slowly)
nms = _planted(nms)(lambda kept: kept[1:])
batched_nms = _planted(batched_nms)(_die)
del sigmoid_focal_loss
"""


@pytest.fixture(autouse=True, scope="module")
def no_other_repository() -> Iterator[None]:
    """In a hook, git names its repository by variables, which win over -C."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            patch.delenv(name)
        yield


def git(repository: Path, *command: str) -> str:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ("git", "-C", str(repository), *who, *command),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits of the library: "base", with what is planted, and the present one."""
    root = tmp_path_factory.mktemp("repository")
    for folder in ("dlops_triton", "kernels", "reference", "perf"):
        leave = shutil.ignore_patterns("__pycache__", "out", "results")
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=leave)
    init, harness = root / "dlops_triton" / "__init__.py", root / "perf" / "__init__.py"
    present, present_harness = init.read_text(), harness.read_text()
    init.write_text(present + PLANTED)
    harness.write_text("raise ImportError('the harness is that of the present tree')\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "base")
    git(root, "tag", "base")
    init.write_text(present)
    harness.write_text(present_harness)
    git(root, "commit", "--quiet", "-am", "present")
    return root


@pytest.fixture
def in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(rows, "ROOT", repository)
    monkeypatch.setattr(rows, "OUT", repository / "perf" / "out")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the processes use the CPU reference
    yield repository
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert git(repository, "status", "--porcelain", "--", "dlops_triton", "kernels") == ""


def job(op: str, mode: str = "fwd", **sizes: int) -> bench.Job:
    known = bench.load(op)
    case = dataclasses.replace(known.cases[0], name=f"tiny-{op}", sizes=sizes, small=sizes)
    return known, case, "fp32", mode


IOU = job("iou", n=33, m=17)
JOBS = [
    job("iou", "fwd+bwd", n=33, m=17),
    job("focal", n=40, c=80),
    job("nms", n=96, kept=16),
    job("nms", n=96, kept=16, classes=4),
    IOU,
]


def test_another_commit_is_measured_beside_the_present_one(
    in_repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "ROUNDS", (3, 3))
    file = tmp_path / "compared.jsonl"
    assert compare.run(JOBS, "base", CPU, out=file, commit="abcdef") == 0

    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["op"], row["mode"]) for row in found] == [("iou", "fwd+bwd"), ("iou", "fwd")]
    for row in found:
        assert (row["kind"], row["gpu"], row["commit"]) == ("compared", "CPU", "abcdef")
        assert row["base"] == git(in_repository, "rev-parse", "base")[:12]
        assert row["clocks"] == ["eager"]
        assert row["samples"] == 6
        assert row["eager_base_p50_us"] > 30_000 > row["eager_ours_p50_us"] > 0
        assert row["eager_ratio_p20"] <= row["eager_ratio_p50"] <= row["eager_ratio_p80"]
        assert row["eager_ratio_p50"] > 2
        assert row["eager_verdict"] == "faster"

    said = capfd.readouterr().out
    table, left_out = said[said.index("op case") :].split("Rows:")
    assert "iou tiny-iou fp32 fwd+bwd" in table
    assert "iou, geometric mean of 2" in table
    focal, wrong, died = (part.strip() for part in left_out.split("not compared: ")[1:])
    assert focal.startswith("focal tiny-focal fp32 fwd: new since base: cannot import name")
    assert wrong.startswith("nms tiny-nms fp32 fwd: the base: WRONG")
    assert died.splitlines()[0] == "nms tiny-nms fp32 fwd: the base: its process died"
    assert died.splitlines()[-1].strip().endswith("planted end")


def test_a_base_that_does_not_import_is_said_at_once(
    in_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = in_repository / "dlops_triton" / "__init__.py"
    present = broken.read_text()
    broken.write_text("1 / 0\n")
    git(in_repository, "commit", "--quiet", "-am", "broken")
    broken.write_text(present)
    git(in_repository, "commit", "--quiet", "-am", "mended")
    assert compare.run(JOBS, "HEAD~1", CPU) == 2
    said = capsys.readouterr().out
    assert "--base: the base: its process died" in said
    assert "ZeroDivisionError" in said


def test_unknown_commits_and_folders_without_git_are_said(
    in_repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for unknown in ("nowhere", "--help", ""):
        assert compare.run(JOBS, unknown, CPU) == 2
        assert f"git knows no commit {unknown!r}" in capsys.readouterr().out
    git(in_repository, "tag", "empty", git(in_repository, "commit-tree", "-m", "x", EMPTY_TREE))
    assert compare.run(JOBS, "empty", CPU) == 2
    assert "has no dlops_triton" in capsys.readouterr().out
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    assert compare.run(JOBS, "base", CPU) == 2
    assert "needs a git checkout" in capsys.readouterr().out


EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"


# --- without processes -----------------------------------------------------------------------


class Fake:
    """A side that answers at once: every sample takes the next of its seconds."""

    def __init__(self, name: str, seconds: list[Any], log: list[str]) -> None:
        self.name, self.seconds, self.log = name, iter(seconds), log

    def start(self) -> None: ...
    def wait(self) -> None: ...
    def release(self) -> None:
        self.log.append(f"{self.name} release")

    def stop(self) -> str:
        self.log.append(f"{self.name} stop")
        return ""

    def ask(self, what: str, **about: Any) -> rows.Row:
        if what == "prepare":
            return {"clocks": ["device", "eager"]}
        self.log.append(self.name)
        seconds = next(self.seconds)
        if isinstance(seconds, BaseException):
            raise seconds
        return {"seconds": {"device": seconds, "eager": 10 * seconds}}


def test_sides_take_turns_and_a_ratio_is_that_of_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "ROUNDS", (3, 9))
    monkeypatch.setattr(compare, "SHARE_S", -1.0)
    log: list[str] = []
    # The device grows slower all the time; ours takes half of what base takes throughout.
    sides = {
        "ours": Fake("ours", [1, 2, 4, 8, 16, 32], log),
        "base": Fake("base", [2, 4, 8, 16, 32, 64], log),
    }
    samples = compare._samples(sides, IOU, "base")
    released = ["ours release", "base release"]
    assert log == [
        *("base", "ours", "ours", "base", "base", "ours", *released),
        *("ours", "base", "base", "ours", "ours", "base", *released),
    ]
    assert samples == {
        "device": {"base": [2, 4, 8, 16, 32, 64], "ours": [1, 2, 4, 8, 16, 32]},
        "eager": {"base": [20, 40, 80, 160, 320, 640], "ours": [10, 20, 40, 80, 160, 320]},
    }
    row = compare.summary(samples)
    assert row["clocks"] == ["device", "eager"]
    assert [row[f"device_ratio_{name}"] for name in ("p20", "p50", "p80")] == [2, 2, 2]
    assert (row["device_base_p50_us"], row["eager_ours_p50_us"], row["samples"]) == (12e6, 6e7, 6)
    assert row["device_verdict"] == "faster"


def test_quantiles_of_ratios_and_their_geometric_mean() -> None:
    base = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    row = compare.summary({"eager": {"base": base, "ours": [1.0] * 6}})
    assert [row[f"eager_ratio_{name}"] for name in ("p20", "p50", "p80")] == [2, 3.5, 5]
    named = {"op": "iou", "case": "a", "dtype": "fp32", "mode": "fwd"}
    halves = compare.summary({"eager": {"base": [1e-6], "ours": [2e-6]}})
    eights = compare.summary({"eager": {"base": [8e-6], "ours": [1e-6]}})
    lines = compare.table([named | halves, named | eights]).splitlines()
    assert lines[1].split() == [
        *("iou", "a", "fp32", "fwd", "eager", "1.0", "2.0"),
        *("0.500", "(0.500", "to", "0.500)", "slower"),
    ]
    assert lines[2].split()[-5:] == ["8.000", "(8.000", "to", "8.000)", "faster"]
    assert lines[3].split() == ["iou,", "geometric", "mean", "of", "2", "eager", "2.000"]


@pytest.mark.parametrize(
    ("quantiles", "word"),
    [
        ((1.2, 1.3, 1.4), "faster"),
        ((0.7, 0.8, 0.9), "slower"),
        ((0.9, 1.2, 1.4), "same"),
        ((0.8, 0.9, 1.1), "same"),
        ((1.001, 1.005, 1.009), "same"),  # sure, and too little to say so
        ((0.991, 0.995, 0.999), "same"),
    ],
)
def test_verdicts(quantiles: tuple[float, float, float], word: str) -> None:
    assert compare.verdict(*quantiles) == word


def start_fakes(monkeypatch: pytest.MonkeyPatch, ours: list[Any], base: list[Any]) -> list[str]:
    log: list[str] = []
    fakes = iter([Fake("ours", ours, log), Fake("base", base, log)])
    monkeypatch.setattr(compare, "Worker", lambda *_: next(fakes))
    monkeypatch.setattr(compare, "ROUNDS", (1, 1))
    monkeypatch.setattr(compare, "PAIRINGS", 1)
    return log


def test_interrupted_it_keeps_what_was_measured(
    in_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = start_fakes(monkeypatch, [1, KeyboardInterrupt()], [3, 1])
    assert compare.run([IOU] * 3, "base", CPU) == 0
    file = in_repository / "perf" / "out" / "compare-cpu.jsonl"
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["device_ratio_p50"] == 3
    assert "not compared: the rest: interrupted" in capsys.readouterr().out
    assert log[-2:] == ["ours stop", "base stop"]
    file.unlink()


def test_a_side_that_fails_while_it_is_timed_ends_only_its_job(
    in_repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = start_fakes(monkeypatch, [1, 1], [compare.LeftOutError("the base: no"), 2])
    assert compare.run([IOU, IOU], "base", CPU, out=tmp_path / "a.jsonl") == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1
    assert "iou tiny-iou fp32 fwd: the base: no" in capsys.readouterr().out
    assert log.count("ours release") == log.count("base release") == 2


def test_no_job_starts_after_the_budget_and_nothing_compared_is_a_failure(
    in_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_fakes(monkeypatch, [], [])
    assert compare.run([IOU] * 3, "base", CPU, budget_s=0.0) == 1
    assert "not compared: 3 cases: the budget is spent" in capsys.readouterr().out


def test_the_worktree_is_removed_when_the_process_is_told_to_end(
    in_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    trees: list[Path] = []

    def told_to_end() -> None:
        with compare._interruptible(), compare._worktree("base") as (_, library):
            assert (library / "dlops_triton" / "kernels" / "iou.py").exists()
            trees.append(library)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        told_to_end()
    assert not trees[0].parent.exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_library_inside_a_larger_repository_is_found_in_its_worktree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "vendored" / "dlops"
    (inner / "dlops_triton").mkdir(parents=True)
    (inner / "dlops_triton" / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    monkeypatch.setattr(rows, "ROOT", inner)
    with compare._worktree("HEAD") as (commit, library):
        assert commit == git(tmp_path, "rev-parse", "HEAD")[:12]
        assert (library / "dlops_triton" / "__init__.py").exists()
        assert not library.is_relative_to(tmp_path)


def test_a_process_that_does_not_answer_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "silent.py"
    silent.write_text(
        "import sys, time\nprint('busy', file=sys.stderr, flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(compare, "_WORKER", silent)
    monkeypatch.setattr(compare, "ANSWER_S", 1.0)
    worker = compare.Worker("the base", tmp_path, CPU)
    worker.start()
    process = worker._process
    assert process is not None
    with pytest.raises(compare.DiedError, match="gave no answer for 1 s\n    busy"):
        worker.ask("prepare")
    assert process.returncode == -signal.SIGKILL
