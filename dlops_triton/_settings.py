"""Launch settings: what a launcher asks of its kernel on the GPU at hand.

Each file of ``tuned/`` holds what `perf tune` found on one GPU model. Without one for the GPU at
hand a setting is that of another GPU of its architecture, else of the nearest architecture of its
vendor, by number, the older of two equally near; else the default beside the launcher. Inputs of 2
and of 4 bytes per element are tuned apart.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import _dispatch

Values = Mapping[str, int]

ALL: dict[str, Settings] = {}  # by name

TUNED = Path(__file__).with_name("tuned")
folders = [TUNED]  # of tables; of two for the same GPU, that of the earlier folder counts


class Settings:
    """The settings of one kernel: constexprs, ``num_warps``, and what only its launcher reads."""

    def __init__(self, name: str, fp32: Values, fp64: Values | None = None):
        """The defaults, by the dtype of the arithmetic."""
        if name in ALL:
            raise ValueError(f"there are settings named {name!r} already")
        ALL[name] = self
        self.name = name
        self.defaults = {torch.float32: fp32, torch.float64: fp64 or fp32}
        self._found: dict[tuple[str, str, torch.dtype], Values] = {}
        self._override: Override | None = None

    def on(self, t: Tensor) -> Values:
        """The settings of a launch on the device of ``t``, an input, and for its dtype."""
        key = (*_dispatch.gpu(t.device), t.dtype)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self.look_up(*key)
        if self._override is None:
            return found
        self._override.launches += 1
        return {**found, **self._override.values}

    def look_up(self, gpu: str, target: str, dtype: torch.dtype) -> Values:
        """The settings on a GPU of that name and target, overrides aside."""
        defaults = self.defaults[_dispatch.compute_dtype(dtype)]
        for table in _nearest(gpu, target):
            values = table.settings.get(self.name, {}).get(str(dtype.itemsize))
            if values is not None:
                return {**defaults, **values}
        return defaults

    def check(self, values: Values) -> None:
        """Raise ValueError unless these could be settings."""
        known = self.defaults[torch.float32]
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{self.name} has no setting {key!r}, but {', '.join(known)}")
            if type(value) is not int or value < 1:
                raise ValueError(f"{self.name}: {key} must be a positive integer, got {value!r}")


@dataclass
class Override:
    """Settings that hold on every device and for every dtype."""

    values: Values
    launches: int = 0  # that asked for them


@contextlib.contextmanager
def override(name: str, **values: int) -> Iterator[Override]:
    """Let some or all of the settings of that name be ``values``.

    In all threads, for autograd runs a backward pass in one of its own.
    """
    settings = ALL[name]
    settings.check(values)
    outer = settings._override
    settings._override = Override({**(outer.values if outer else {}), **values})
    try:
        yield settings._override
    finally:
        settings._override = outer


def reload() -> None:
    """Read the tables anew before the next launch: files, or ``folders``, have changed."""
    _tables.cache_clear()
    for settings in ALL.values():
        settings._found.clear()


@dataclass(frozen=True)
class Table:
    """What one GPU model wants, by the names of settings and by bytes per element of the input."""

    gpu: str
    target: str
    settings: Mapping[str, Mapping[str, Values]]


def read(file: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: it is malformed, or has settings that no kernel has.
    """
    try:
        content = json.loads(file.read_text())
        table = Table(content["gpu"], content["target"], content["settings"])
        if not _architecture(table.target)[0]:
            raise ValueError(f"no compiler has the target {table.target!r}")
        for name, by_size in table.settings.items():
            if name not in ALL:
                raise ValueError(f"no kernel has settings named {name!r}")
            for size, values in by_size.items():
                if size not in ("2", "4", "8"):
                    raise ValueError(f"{name}: no dtype has {size!r} bytes per element")
                ALL[name].check(values)
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        why = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{file} is no table of launch settings: {why}") from e
    return table


@functools.cache
def _tables() -> list[Table]:
    return [read(file) for folder in folders for file in sorted(folder.glob("*.json"))]


def _nearest(gpu: str, target: str) -> list[Table]:
    """The tables for GPUs of this one's vendor, the most fitting first."""
    vendor, number = _architecture(target)

    def distance(table: Table) -> tuple[bool, int, int]:
        other = _architecture(table.target)[1]
        return table.gpu != gpu, abs(other - number), other

    # Not a GPU, or none that is known: no table is read.
    tables = _tables() if vendor else []
    return sorted((t for t in tables if _architecture(t.target)[0] == vendor), key=distance)


def _architecture(target: str) -> tuple[str, int]:
    """Vendor's prefix and number of "sm_90" or "gfx90a" (hexadecimal); ("", 0) for neither."""
    for prefix, base in (("sm_", 10), ("gfx", 16)):
        if target.startswith(prefix):
            with contextlib.suppress(ValueError):
                return prefix, int(target.removeprefix(prefix), base)
    return "", 0
