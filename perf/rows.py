"""Result rows: one JSON object per line, with what is needed to believe and to repeat it.

A row's ``kind`` is "measured" or "probe" (of the roofs), both on the GPU that it names and appended
to ``perf/results/<gpu>.jsonl``; "tuned", the evidence of the tuner; or "predicted", without a GPU.
A file may be appended to by several processes at once, and may end in the half line of a process
that was killed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton

from dlops_triton import __version__

if sys.platform != "win32":
    import fcntl

Row = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[1]
IN_CHECKOUT = (_ROOT / "pyproject.toml").exists() and (_ROOT / "kernels").is_dir()
ROOT = _ROOT if IN_CHECKOUT else Path.cwd()
RESULTS = ROOT / "perf" / "results"
OUT = ROOT / "perf" / "out"
PREDICTED = "predicted.jsonl"

# What makes two rows rows of the same thing, of which the newer counts.
KEY = ("kind", "gpu", "op", "case", "mode", "dtype", "provider", "setting", "candidate", "base")
# What a row must have to be read, by its kind.
_WORK = ("op", "case", "mode", "dtype", "provider", "sizes", "bytes", "operations", "command")
_NEEDED = {
    "measured": ("gpu", "date", *_WORK),
    "predicted": ("gpu", "date", *_WORK, "predicted_us", "limit", "kernels"),
    "probe": ("gpu", "date", "roofs"),
    "tuned": ("gpu", "date", "setting"),
    "compared": ("gpu", "date", "base"),
}
# What must agree, beside, for a measurement not to be repeated.
SAME_CODE = ("commit", "torch", "triton", "driver")


def append(file: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, whoever else is adding to it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as out:
        if sys.platform != "win32":
            fcntl.flock(out, fcntl.LOCK_EX)
        size = out.seek(0, os.SEEK_END)
        if size:
            out.seek(size - 1)
            if out.read(1) != b"\n":  # of a line that was cut short
                text = "\n" + text
        out.write(text.encode())


def read(files: Iterable[Path]) -> list[Row]:
    """The newest row of each thing; of rows equally old, the later one.

    Lines that are no row, of a kind that is not known or without what it needs, are told of.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for file in files:
        for row in read_all(file):
            if why := _misfit(row):
                print(f"{file}: {why}, so left out", file=sys.stderr)
                continue
            key = tuple(_hashable(row.get(name)) for name in KEY)
            if key not in newest or row.get("date", "") >= newest[key].get("date", ""):
                newest[key] = row
    return list(newest.values())


def read_all(file: Path) -> list[Row]:
    """Every row of a file, in order."""
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:  # of the JSON, or of its encoding
            row = None
        if isinstance(row, dict):
            found.append(row)
        elif line.strip():
            print(f"{file}:{number}: not a whole row, so left out", file=sys.stderr)
    return found


def _misfit(row: Row) -> str:
    needed = _NEEDED.get(str(row.get("kind")))
    if needed is None:
        return f"a row of the unknown kind {row.get('kind')!r}"
    lacking = [name for name in needed if name not in row]
    return f"a {row['kind']} row without {', '.join(lacking)}" if lacking else ""


def _hashable(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def files() -> list[Path]:
    """Result files: the committed ones, then those of this checkout's own runs."""
    return [*sorted(RESULTS.glob("*.jsonl")), *sorted(OUT.glob("*.jsonl"))]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def provenance(commit: str | None = None) -> Row:
    """The part of a row that says where it comes from; ``commit`` for copies without git."""
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dlops_triton": __version__,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "dlops_triton.perf", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit, with a digest of the changes to files that are in it; None without git."""
    if not IN_CHECKOUT or not (found := said("git", "-C", str(ROOT), "rev-parse", "HEAD")):
        return None
    tree = ("diff", "--binary", "HEAD", "--", ".", ":!perf/results", ":!*.md")
    done = subprocess.run(["git", "-C", str(ROOT), *tree], capture_output=True, check=False)
    changes = f"+changes-{hashlib.sha1(done.stdout).hexdigest()[:8]}" if done.stdout else ""
    return found[:12] + changes


def said(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]  # type: ignore[list-item]
