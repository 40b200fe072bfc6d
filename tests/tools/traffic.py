"""Count the memory traffic of interpreted kernels, and catch every access outside a tensor.

What is counted is what active lanes ask for: no caches, no coalescing, a scalar once per program.
Distinct 32-byte sectors per launch bound the traffic of DRAM from below. None of it is a
measurement of a device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import triton
from triton.runtime import interpreter as core
from triton.runtime.errors import InterpreterError

from .bounds import Bounds, untag

Array = npt.NDArray[Any]
_Kind = Literal["load", "store", "atomic"]

SECTOR = 32
_COUNTERS = {
    "load": ("loaded", "loads"),
    "store": ("stored", "stores"),
    "atomic": ("atomic", "atomics"),
}


@dataclass
class Traffic:
    """What the kernels launched in a `traffic` block asked for."""

    loaded: int = 0  # bytes
    stored: int = 0
    atomic: int = 0
    loads: int = 0  # instructions: one load of a block counts once
    stores: int = 0
    atomics: int = 0
    launches: int = 0
    programs: int = 0
    out_of_bounds: int = 0  # lanes
    loaded_sectors: int = 0  # distinct in each launch, summed over launches; atomics are in both
    stored_sectors: int = 0
    kernels: list[str] = field(default_factory=list)  # one name per launch

    @property
    def total(self) -> int:
        """Bytes moved; an atomic reads and writes."""
        return self.loaded + self.stored + 2 * self.atomic

    @property
    def dram(self) -> int:
        """Bytes that DRAM must move at least, if no launch finds another's data in a cache."""
        return SECTOR * (self.loaded_sectors + self.stored_sectors)


class _Launch:
    """One kernel launch: what it may touch, and what it touched."""

    def __init__(self, kernel: str, reachable: Iterable[torch.Tensor]):
        self.kernel = kernel
        self.bounds = Bounds(reachable)
        self.fault: str | None = None
        self._sectors: dict[str, list[Array]] = {"load": [], "store": []}

    def check(self, kind: _Kind, lanes: Array, size: int) -> int:
        """How many lanes are out of bounds; `fault` then says where."""
        strays = self.bounds.strays(lanes, size)
        if strays.size:
            self.fault = (
                f"{self.kernel}: {kind} with {strays.size} of {lanes.size} active lanes out of "
                f"bounds; {self.bounds.describe(strays, size)}"
            )
        return int(strays.size)

    def touch(self, kind: _Kind, lanes: Array) -> None:
        sectors = np.unique(untag(lanes) // np.uint64(SECTOR))
        for side in ("load", "store") if kind == "atomic" else (kind,):
            seen = self._sectors[side]
            seen.append(sectors)
            if len(seen) > 256:
                seen[:] = [np.unique(np.concatenate(seen))]

    def distinct(self, side: str) -> int:
        seen = self._sectors[side]
        return len(np.unique(np.concatenate(seen))) if seen else 0


class _Meter(NamedTuple):
    """One open `traffic` block."""

    traffic: Traffic
    reachable: tuple[torch.Tensor, ...]
    sectors: bool


class _Memory:
    """Stands in for the interpreter's native module: sees each access, removes the tags."""

    def __init__(self, native: Any):
        self.native = native
        self.meters: list[_Meter] = []  # blocks may nest; each counts
        self.launch: _Launch | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def load(self, pointers: Array, mask: Array, other: Array, dtype: Any) -> Array:
        addresses = self._access("load", pointers, mask, np.dtype(dtype).itemsize)
        return self.native.load(addresses, mask, other, dtype)

    def store(self, pointers: Array, value: Array, mask: Array) -> None:
        addresses = self._access("store", pointers, mask, value.itemsize)
        self.native.store(addresses, value, mask)

    def atomic_rmw(self, op: Any, pointers: Array, value: Array, mask: Array, sem: Any) -> Array:
        addresses = self._access("atomic", pointers, mask, value.itemsize)
        return self.native.atomic_rmw(op, addresses, value, mask, sem)

    def atomic_cas(self, pointers: Array, expected: Array, value: Array, sem: Any) -> Array:
        addresses = self._access("atomic", pointers, np.ones(pointers.shape, bool), value.itemsize)
        return self.native.atomic_cas(addresses, expected, value, sem)

    def _access(self, kind: _Kind, pointers: Array, mask: Array, size: int) -> Array:
        """Count and check the active lanes, and return real addresses."""
        if mask.shape != pointers.shape:
            mask = np.broadcast_to(mask, pointers.shape)
        active = int(np.count_nonzero(mask))
        lanes = pointers if active == mask.size else pointers[mask]
        launch = self.launch
        assert launch is not None, "memory is only reached in a launch"
        bad = launch.check(kind, lanes, size) if active else 0
        bytes_of, count_of = _COUNTERS[kind]
        for meter in self.meters:
            counters = vars(meter.traffic)
            counters[bytes_of] += active * size
            counters[count_of] += 1
            counters["out_of_bounds"] += bad
        if launch.fault:
            raise IndexError(launch.fault)
        if active and any(meter.sectors for meter in self.meters):
            launch.touch(kind, lanes)
        return untag(pointers)

    def begin(self, kernel: str) -> _Launch:
        self.launch = _Launch(kernel, (t for meter in self.meters for t in meter.reachable))
        return self.launch

    def end(self, launch: _Launch) -> None:
        for traffic, _, sectors in self.meters:
            traffic.launches += 1
            traffic.programs += math.prod(core.interpreter_builder.grid_dim)
            traffic.kernels.append(launch.kernel)
            if sectors:
                traffic.loaded_sectors += launch.distinct("load")
                traffic.stored_sectors += launch.distinct("store")


@contextlib.contextmanager
def _installed() -> Iterator[_Memory]:
    """The hooks of the innermost open block, or fresh ones, removed at the end."""
    if isinstance(core._interpreter, _Memory):
        yield core._interpreter
        return
    memory = _Memory(core._interpreter)
    run, copy_arguments = core.GridExecutor.__call__, core.GridExecutor._init_args_hst
    to_tensor = core._implicit_cvt

    def tagged(arg: Any) -> Any:
        converted = to_tensor(arg)
        if hasattr(arg, "data_ptr") and memory.launch is not None:
            converted.handle.data = converted.handle.data | memory.launch.bounds.tag(arg)
        return converted

    def host_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        copies = copy_arguments(self, args, kwargs)
        if memory.launch is not None:
            by_position = zip(self.arg_names, copies[0], strict=False)
            memory.launch.bounds.name((*by_position, *copies[1].items()))
        return copies

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        current = memory.begin(self.fn.__name__)
        try:
            run(self, *args, **kwargs)
        except InterpreterError:
            if current.fault:
                raise IndexError(current.fault) from None
            raise
        else:
            memory.end(current)
        finally:
            memory.launch = None

    with (
        mock.patch.multiple(core, _interpreter=memory, _implicit_cvt=tagged),
        mock.patch.multiple(core.GridExecutor, __call__=launch, _init_args_hst=host_arguments),
    ):
        yield memory


@contextlib.contextmanager
def traffic(tensors: Iterable[torch.Tensor] = (), *, sectors: bool = False) -> Iterator[Traffic]:
    """Count the traffic of the kernels launched in the block, and check every access.

    Args:
        tensors: memory that kernels may reach through addresses they load, beside their arguments.
        sectors: whether to find the distinct sectors, which costs more than all the rest.

    Raises:
        IndexError: an active lane lies outside the tensor that its pointer came from.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in the interpreter only: set TRITON_INTERPRET=1")
    with _installed() as memory:
        memory.meters.append(_Meter(Traffic(), tuple(tensors), sectors))
        try:
            yield memory.meters[-1].traffic
        finally:
            memory.meters.pop()
