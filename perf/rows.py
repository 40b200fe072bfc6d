"""Result rows: one JSON object per line, with what is needed to believe and to repeat it.

A row's ``kind`` is "measured" (on the GPU it names) or "static" (without one). Measured rows are
evidence and are appended to ``perf/results/<gpu>.jsonl``, which is committed; a static report can
be made again from its commit, so it goes to ``perf/out``.
"""

from __future__ import annotations

import datetime
import json
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

Row = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[1]
IN_CHECKOUT = (_ROOT / "pyproject.toml").exists() and (_ROOT / "kernels").is_dir()
ROOT = _ROOT if IN_CHECKOUT else Path.cwd()
RESULTS = ROOT / "perf" / "results"
OUT = ROOT / "perf" / "out"

# What makes two measurements measurements of the same thing.
KEY = ("kind", "op", "case", "mode", "dtype", "provider", "gpu", "target")


def append(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def read(files: Iterable[Path]) -> list[Row]:
    """The newest row of each measurement; of files and lines, later is newer."""
    newest: dict[tuple[Any, ...], Row] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            newest[tuple(row.get(name) for name in KEY)] = row
    return list(newest.values())


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
    """The commit, with "+changes" if files that are in it were changed; None without git."""
    found = said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD") if IN_CHECKOUT else None
    if not found:
        return None
    tree = ("diff", "--quiet", "HEAD", "--", ".", ":!perf/results")
    changed = subprocess.run(["git", "-C", str(ROOT), *tree], capture_output=True, check=False)
    return found + ("+changes" if changed.returncode else "")


def said(*command: str) -> str | None:
    """The first line that a command prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]  # type: ignore[list-item]
