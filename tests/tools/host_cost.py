"""Count what a public call costs the host: kernel launches, torch operations, synchronisations.

Read from torch's profiler, which also sees the operations inside a registered op, where a dispatch
mode is off, and those inside other operations: indexing by a bool mask shows its ``nonzero``. So a
CPU-only machine finds what would make a GPU wait. The few calls that leave no trace on a CPU
tensor (``.cpu()``, ``.tolist()``) are watched by name.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.autograd import profiler

from dlops_triton import _dispatch

# Each reads a value, or the size of its result, back from the device.
_SYNCHRONISING = {
    "aten::_unique",
    "aten::_unique2",
    "aten::allclose",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
}
# A scalar is read by this. Inside other operations it is an artefact of their CPU implementation.
_READ = "aten::_local_scalar_dense"
_ASKS_TO_READ = {"aten::item", "aten::is_nonzero"}

# The second group copies values from pageable host memory, which waits for the stream as well.
_WATCHED = (
    *((torch.Tensor, name) for name in ("cpu", "numpy", "tolist", "__array__")),
    *((torch, name) for name in ("tensor", "as_tensor", "from_numpy")),
    (torch.Tensor, "new_tensor"),
)

_LAUNCH = "launch "


@dataclass
class HostCost:
    """What happened in a `host_cost` block, complete once the block has ended."""

    launches: list[str] = field(default_factory=list)  # kernel names
    torch_ops: Counter[str] = field(default_factory=Counter)  # as called; views, allocations too
    synchronisations: list[str] = field(default_factory=list)  # the operation and what called it

    def read(self, events: Iterator[Any]) -> None:
        """Sort the profiler's events, leaving out the interpreter's own."""
        for event in events:
            callers = list(_callers(event))
            if any(name.startswith(_LAUNCH) for name in callers):
                continue
            inside = [name for name in callers if name.startswith("aten::")]
            if event.name.startswith("aten::") and not inside:
                self.torch_ops[event.name] += 1
            read = event.name == _READ and _ASKS_TO_READ.issuperset(inside)
            if read or (event.name in _SYNCHRONISING and _SYNCHRONISING.isdisjoint(inside)):
                self.synchronisations.append(" in ".join((event.name, *callers)))


def _callers(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


@contextlib.contextmanager
def host_cost() -> Iterator[HostCost]:
    """Count launches, torch operations and synchronisations of the calls in the block."""
    cost = HostCost()
    launch = _dispatch.launch
    launching = False

    def counted(kernel: Any, *args: Any, **settings: Any) -> None:
        nonlocal launching
        cost.launches.append(kernel.fn.__name__)
        launching = True
        try:
            with profiler.record_function(_LAUNCH + kernel.fn.__name__):
                launch(kernel, *args, **settings)
        finally:
            launching = False

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not launching:
                cost.synchronisations.append(name)
            return call(*args, **kwargs)

        return wrapper

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_dispatch, "launch", counted))
        for owner, name in _WATCHED:
            call = watched(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, call))
        profile = stack.enter_context(profiler.profile())
        yield cost
    cost.read(iter(profile.function_events))


@dataclass
class Memory:
    """Bytes on the CPU that a block allocated, complete once the block has ended."""

    total: int = 0
    peak: int = 0  # at once, less what was freed of before


@contextlib.contextmanager
def memory() -> Iterator[Memory]:
    """Follow allocations by torch's profiler, which also sees those inside of operations."""
    found = Memory()
    with profiler.profile(profile_memory=True) as profile:
        yield found
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        found.total += max(0, event.nbytes())
        found.peak = max(found.peak, now)
