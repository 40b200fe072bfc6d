"""Result files: what is appended is read again, whoever else writes and however it ended."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dlops_triton

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")

from dlops_triton.perf import rows

ROOT = Path(__file__).parents[1]
FIRST = {
    "kind": "measured",
    "gpu": "y",
    "op": "nms",
    "case": "a",
    "mode": "fwd",
    "dtype": "fp32",
    "provider": "ours",
    "sizes": {"n": 1},
    "bytes": 1,
    "operations": 1,
    "date": "2000-01-02",
    "command": "run",
    "us": 1.0,
}
SECOND = FIRST | {"case": "b"}


def test_rows_round_trip_and_the_newest_counts(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "gpu.jsonl"
    rows.append(file, [FIRST, SECOND])
    newer, older = FIRST | {"us": 2.0}, SECOND | {"us": 3.0, "date": "2000-01-01"}
    rows.append(file, [newer, older])
    assert len(file.read_text().splitlines()) == 4
    assert rows.read([file]) == [newer, SECOND]
    assert rows.read_all(file) == [FIRST, SECOND, newer, older]


def test_measurements_of_different_gpus_and_candidates_stay_apart(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    predicted = {"kind": "predicted", "predicted_us": 1.0, "limit": "bytes", "kernels": []}
    different = [FIRST, FIRST | {"gpu": "x"}, FIRST | predicted]
    different += [FIRST | {"candidate": {"BLOCK": block}} for block in (256, 512)]
    rows.append(file, different)
    assert rows.read([file]) == different


@pytest.mark.parametrize("cut", [b'{"kind": "meas', b'{"kind": "\xc3', b"17"])
def test_a_line_that_was_cut_short_costs_that_line_only(
    cut: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    rows.append(file, [FIRST])
    with file.open("ab") as out:
        out.write(cut)
    assert rows.read([file]) == [FIRST]
    assert f"{file}:2: not a whole row" in capsys.readouterr().err
    rows.append(file, [SECOND])
    assert rows.read([file]) == [FIRST, SECOND]


def test_rows_that_nothing_can_be_made_of_are_left_out_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    short = {k: v for k, v in FIRST.items() if k not in ("gpu", "bytes")}
    rows.append(file, [{"no": "kind"}, {"kind": "static"}, short, FIRST])
    assert rows.read([file]) == [FIRST]
    assert capsys.readouterr().err.splitlines() == [
        f"{file}: a row of the unknown kind None, so left out",
        f"{file}: a row of the unknown kind 'static', so left out",
        f"{file}: a measured row without gpu, bytes, so left out",
    ]


def test_processes_that_write_at_once_do_not_mix_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    program = (
        "import sys; from pathlib import Path; from dlops_triton.perf import rows\n"
        "for i in range(150):\n"
        "    long = {'text': sys.argv[2] * 3000}\n"
        "    rows.append(Path(sys.argv[1]), [{'writer': sys.argv[2], 'n': i} | long] * 5)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(file), name], cwd=ROOT)
        for name in "ab"
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for name in "ab":
        mine = [row for row in found if row["writer"] == name]
        assert [row["n"] for row in mine] == [i for i in range(150) for _ in range(5)]
        assert all(row["text"] == name * 3000 for row in mine)


def test_a_writer_waits_for_another(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows.append(file, [FIRST])
    writer = threading.Thread(target=rows.append, args=(file, [SECOND]))
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert rows.read_all(file) == [FIRST]
    writer.join()
    assert rows.read_all(file) == [FIRST, SECOND]


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", "run", "nms"])
    row = rows.provenance("0123")
    assert row["commit"] == "0123"
    assert row["command"] == "python -m dlops_triton.perf run nms"
    assert row["dlops_triton"] == dlops_triton.__version__
    assert rows.slug("NVIDIA H200 (141 GB)") == "nvidia-h200-141-gb"
    assert rows.said("no-such-command-anywhere") is None


def test_changed_code_is_not_the_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    code = tmp_path / "code.py"
    git("init", "-q")
    code.write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "IN_CHECKOUT", True)
    seen = [rows.provenance()["commit"]]
    for text in ("2", "3"):
        code.write_text(text)
        seen.append(rows.provenance()["commit"])
    assert len(set(seen)) == 3
    assert all(commit.startswith(seen[0]) for commit in seen)
    code.write_text("1")
    assert rows.provenance()["commit"] == seen[0]
