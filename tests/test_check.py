"""``python -m dlops_triton check``, as a user runs it, and with faults planted."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dlops_triton
from dlops_triton import _check_run, _installation, _machine, check
from dlops_triton._check_cases import CASES, Maker, Output
from tests.calls import OPS

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dlops_triton", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_op_has_a_case() -> None:
    assert len(OPS) >= 19
    assert set(CASES) == OPS


def test_this_machine_passes() -> None:
    """In JSON, which has all that the table has; the rest of this file looks at the table."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run("check", "--json")
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["ok"]
    # Under a minute, where nothing else keeps the processor; on a GPU there is all to compile, in
    # several processes.
    assert seconds < (240 if torch.cuda.is_available() else 60)
    assert said["seconds"] > 0
    assert "\r" not in done.stderr
    assert said["torch"] == torch.__version__
    assert said["dlops_triton"] == dlops_triton.__version__
    kernels = "kernel" if torch.cuda.is_available() else "interpreter"
    for name, dtypes in (
        (kernels, ["fp32", "fp16", "bf16"] if torch.cuda.is_available() else ["fp32", "fp16"]),
        ("reference", ["fp32", "fp16", "bf16"]),
    ):
        assert said["run_by"][name]
        rows = [row for row in said["results"] if row["run_by"] == name]
        assert {row["op"] for row in rows} == OPS
        assert all(row["ok"] and row["dtypes"] == dtypes for row in rows)
        # Exact where it must be, and compared with something where it need not.
        exact = {row["op"] for row in rows if row["accepted"] == 0}
        assert exact == {"box_match", "nms", "batched_nms", "nms_padded"}
        assert all(0 <= row["difference"] <= row["accepted"] for row in rows)


PLANTED = """
import os, sys
import dlops_triton as d
from dlops_triton import _check_run, _dispatch
from dlops_triton.reference import iou_loss

stock = iou_loss.iou_loss
iou_loss.iou_loss = lambda *args, **options: stock(*args, **options) + 1e-3
launch = _dispatch.launch
def wrong(kernel, grid, *args, **settings):
    launch(kernel, grid, *args, **settings)
    if kernel.__name__ == "match_kernel":
        next(t for t in args if getattr(t, "dtype", None) == __import__("torch").int64)[..., 0] = 7
_dispatch.launch = wrong
def raises(*args, **options):
    raise ValueError("planted\\nand more")
d.box_iou = raises
d.nms_padded = lambda *args, **options: os._exit(9)
_check_run.main()
"""


def test_faults_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong reference, a wrong kernel, an op that raises, one that ends its process; the others
    are run all the same."""
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setattr(check, "WORKER", (sys.executable, str(tmp_path / "planted.py")))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ops = ["generalized_box_iou_loss", "box_match", "box_iou", "nms_padded", "ghmr_loss"]
    assert check.main(["check", *ops]) == 1
    said, _ = capsys.readouterr()
    kernels, *_ = (run.name for run in check.runs())
    rows = {tuple(line.split()[:2]): line.split()[-1] for line in said.splitlines() if line}
    for op, of_kernels, of_reference in (
        ("generalized_box_iou_loss", "MISMATCH", "ok"),  # with itself the reference agrees
        ("box_match", "MISMATCH", "ok"),
        ("box_iou", "RAISED", "RAISED"),
        ("nms_padded", "RAISED", "RAISED"),
        ("ghmr_loss", "ok", "ok"),
    ):
        assert rows[op, kernels] == of_kernels, said
        assert rows[op, "reference"] == of_reference, said
    assert "fp32 raised ValueError: planted\n" in said
    assert "the process that ran it ended with status 9: " in said
    assert "matched: 1 of 67 differ, most of all [0]: 7, expected " in said
    assert "NOT OK: box_iou, box_match, generalized_box_iou_loss, nms_padded." in said
    assert "Traceback" not in said


def test_a_worker_that_cannot_start_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "WORKER", (sys.executable, "-c", "raise OSError('no driver')"))
    (run, *_) = check.runs()
    results = check.check([run], ["nms", "box_iou"], check.Progress(io.StringIO()))
    assert [result["status"] for result in results] == ["RAISED", "RAISED"]
    assert results[1]["problems"] == [
        "the process that ran it ended with status 1: OSError: no driver"
    ]


def test_a_worker_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "WORKER", (sys.executable, "-c", "import time; time.sleep(99)"))
    monkeypatch.setattr(check, "PATIENCE_S", 0.2)
    (run, *_) = check.runs()
    (result,) = check.check([run], ["nms"], check.Progress(io.StringIO()))
    assert "it said nothing for 0 s" in result["problems"][0]


@pytest.mark.parametrize("arguments", [(), ("check", "nmx"), ("check", "--colour"), ("test",)])
def test_bad_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m dlops_triton" in capsys.readouterr().err


def test_a_table_says_what_ran_how() -> None:
    row = {"difference": 1.5e-7, "accepted": 2e-5, "seconds": 0.25, "status": "ok", "problems": []}
    rows = [row | {"op": "box_iou", "run_by": run.name, "dtypes": ["fp32"]} for run in check.runs()]
    said = check.table(check.runs(), rows)
    assert said.isascii()
    assert max(map(len, said.splitlines())) <= 100
    head, *lines = said.splitlines()
    assert len({len(line) - len(line.split()[-1]) for line in lines[:2]}) == 1
    assert head.split() == ["op", "run", "by", "dtypes", "difference", "accepted", "s"]
    assert "compared with itself" in said
    if not torch.cuda.is_available():
        assert "interpreter, for there is no GPU" in said


def test_on_a_gpu_the_compiled_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of the maker")
    kernel, reference = check.runs()
    assert (kernel.name, kernel.device, kernel.interpreted) == ("kernel", "cuda", False)
    assert kernel.dtypes == ("fp32", "fp16", "bf16")
    assert "GPU of the maker" in kernel.words
    assert reference.device == "cpu"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_overwrites_only_on_a_terminal() -> None:
    for out in (Terminal(), io.StringIO()):
        progress = check.Progress(out)
        progress._said -= 9
        progress.show(3, 38, "nms, reference")
        progress.show(4, 38, "box_iou")
        progress.close()
        said = out.getvalue()
        if out.isatty():
            assert said.count("\r") == 4
            assert said.rpartition("\r")[0].endswith(" ")
        else:
            assert said == "checking, 3 of 38 (0 s): nms, reference\n"


# ---- comparisons


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comparison(dtype: torch.dtype) -> None:
    rtol = _check_run.RTOL[dtype]
    want = np.array([1.0, 0.0, -4.0])

    def of(factor: float, **options: Any) -> dict[str, Any]:
        got = torch.tensor(want, dtype=torch.float64)
        got[0] += factor * (rtol + 4 * _check_run.RTOL[torch.float32])
        output = Output("x", got.to(dtype), want, **options)
        return _check_run.compare(output, dtype)

    assert of(0) == {"what": "x", "difference": 0, "accepted": of(0)["accepted"], "problem": ""}
    if dtype == torch.float32:
        assert not of(0.9)["problem"]
        assert of(0.9)["difference"] == pytest.approx(0.9 * of(0.9)["accepted"], rel=1e-2)
        assert "1 of 3 differ, most of all [0]: 1.00011, expected 1" in of(1.1)["problem"]
    assert of(2.5)["problem"]
    if dtype == torch.bfloat16:  # of terms that were rounded more is accepted
        assert not of(2.5, rounded=True)["problem"]
    assert of(0.9, exact=True)["problem"]


def test_comparison_of_what_is_no_number_or_of_another_shape() -> None:
    want = np.array([1.0, np.inf, 2.0])
    nan = _check_run.compare(
        Output("x", torch.tensor([1.0, torch.inf, torch.nan]), want), torch.half
    )
    assert nan["difference"] is None
    assert "[2]: nan, expected 2" in nan["problem"]
    short = _check_run.compare(Output("x", torch.ones(2), want), torch.half)
    assert short["problem"] == "shape [2], expected [3]"
    none = _check_run.compare(Output("x", torch.ones(0, 3), np.ones((0, 3))), torch.half)
    assert (none["difference"], none["problem"]) == (0, "")


def test_arguments_are_the_same_each_time() -> None:
    a, b = (Maker(torch.device("cpu"), torch.half, False) for _ in range(2))
    assert torch.equal(a.boxes(3), b.boxes(3))
    assert a.scores(2, 37).unique().numel() == 74


# ---- the installation


def test_what_an_installation_lacks() -> None:
    """In a process each: what is imported stays imported."""
    hide = "import sys; sys.modules[{!r}] = None; import dlops_triton"
    old = (
        "import torch, triton; del triton.knobs; triton.__version__ = '3.3.1'; import dlops_triton"
    )
    for program, words in (
        (hide.format("triton"), "ImportError: dlops_triton needs Triton, also on machines without"),
        (hide.format("torch"), "ImportError: dlops_triton needs torch, and it does not import"),
        (old, "ImportError: dlops_triton needs a newer Triton than 3.3.1, and a torch that goes"),
    ):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(words), done.stderr


def test_versions_compare_by_their_numbers() -> None:
    older = _installation.older
    assert older("2.9.1", "2.10")
    assert not older("2.10.0+cu130", "2.10")
    assert older("3.5.1", "3.6")
    assert not older("3.10", "3.9.2")
    assert older("2.10.0a0+git", "2.11")


def test_notes_say_what_is_amiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_installation, "minimum", lambda: {"torch": "99.1", "numpy": "1.0"})
    monkeypatch.setattr(_machine, "_visible_gpu", lambda: "nvidia-smi lists a GPU")
    monkeypatch.setattr(torch.version, "cuda", None)
    old, blind, *more = _machine.notes([], ["CUDA initialization: driver too old"])
    assert old == f"torch {torch.__version__} is older than 99.1, the oldest supported."
    assert blind.startswith("nvidia-smi lists a GPU, but torch sees no GPU. torch ")
    assert "is built without CUDA and ROCm" in blind
    assert more[0] == "torch says: CUDA initialization: driver too old"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides it." in _machine.notes([], [])[1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "the driver may be too old" in _machine.notes([], [])[1]
    monkeypatch.setattr(_machine, "_visible_gpu", lambda: "")
    turing = {"name": "T4", "target": "sm_75", "memory_gib": 16}
    assert any(line.startswith("T4 is sm_75;") for line in _machine.notes([turing], []))
    new = {"name": "B200", "target": "sm_100", "memory_gib": 180}
    assert not any("B200" in line for line in _machine.notes([new], []))


def test_header_is_aligned() -> None:
    here = _machine.machine()
    here["gpus"] = [{"name": "A", "target": "sm_90", "memory_gib": 80.0}] * 2
    here["notes"] = ["a word " * 40]
    said = _machine.header(here)
    assert said.isascii()
    assert max(map(len, said.splitlines())) <= 100 + len(str(ROOT))
    assert "GPU 1         A, sm_90, 80.0 GiB" in said
    assert all(line[13] == " " and line[14] != " " for line in said.splitlines())
