"""Outputs of other libraries on small inputs, kept in tests/data, that pin the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

_DATA = Path(__file__).parent / "data"


def cases(op: str) -> list[Any]:
    """(arguments, arrays by name) of every case of ``op``, as pytest parameters."""
    arrays = np.load(_DATA / "peers.npz")
    found = []
    for case in json.loads((_DATA / "peers.json").read_text())["cases"]:
        if case["op"] == op:
            prefix = case["id"] + "."
            named: dict[str, npt.NDArray[Any]] = {
                name.removeprefix(prefix): arrays[name]
                for name in arrays
                if name.startswith(prefix)
            }
            found.append(pytest.param(case, named, id=case["id"]))
    return found
