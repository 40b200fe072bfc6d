"""Results of the compile gate for tests, computed once however many workers run them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import pytest
from filelock import FileLock  # a requirement of torch

from .compile_gate import CASES, TARGETS, Record, load, run_gate, save


def shared_gate(
    factory: pytest.TempPathFactory, cases: str = CASES, targets: Sequence[str] = tuple(TARGETS)
) -> list[Record]:
    """`run_gate`, by the first worker of pytest-xdist that asks; the others wait for its result."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has a folder of its own there
    name = hashlib.sha256(f"{cases} {targets}".encode()).hexdigest()[:16]
    file = folder / f"gate-{name}.jsonl"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            partial = file.with_suffix(".partial")
            save(run_gate(cases, targets), partial)
            partial.rename(file)
    return load(file)


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What every kernel of the library compiles to, for every target."""
    return shared_gate(tmp_path_factory)
