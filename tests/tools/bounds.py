"""Which memory a launch may touch: the tensors it was given, each through its own pointer.

Every pointer argument gets its number in the upper 16 bits, which no address uses and pointer
arithmetic keeps. So a lane is judged by the tensor it set out from: one that strays into a
neighbouring tensor is caught as surely as one that leaves the process's memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

_TAG_SHIFT = 48
_ADDRESS = np.uint64((1 << _TAG_SHIFT) - 1)

Addresses = npt.NDArray[np.uint64]


def untag(pointers: Addresses) -> Addresses:
    """The real addresses."""
    return pointers & _ADDRESS


class _Extent(NamedTuple):
    """The memory from a view's first element to its last, as tagged addresses.

    Not its storage: what lies beyond a slice is not the kernel's to read.
    """

    name: str
    start: int
    end: int
    itemsize: int

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str, tag: int) -> _Extent:
        start = tensor.data_ptr() | tag << _TAG_SHIFT
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps) if tensor.numel() else -1
        return cls(name, start, start + (last + 1) * tensor.element_size(), tensor.element_size())

    def distance(self, lane: int, size: int) -> int:
        """How many bytes an access at `lane` reaches beyond this memory."""
        return max(self.start - lane, lane + size - self.end)


class Bounds:
    """The memory of one launch."""

    def __init__(self, reachable: Iterable[torch.Tensor]):
        self._names: dict[int, str] = {}
        self._arguments: list[_Extent] = []  # number i carries tag i + 1
        # An address that a kernel loaded from memory carries no tag.
        self._untagged = [_Extent.of(t, "a reachable tensor", 0) for t in reachable]

    def name(self, named: Iterable[tuple[str, Any]]) -> None:
        """Learn the names of the tensors among the arguments."""
        self._names.update(_tensors(named))

    def tag(self, tensor: Any) -> np.uint64:
        """Admit an argument; what to set in its pointer."""
        tensor = _unwrapped(tensor)
        name = self._names.get(id(tensor), "an argument")
        tag = len(self._arguments) + 1
        self._arguments.append(_Extent.of(tensor, name, tag))
        self._untagged.append(_Extent.of(tensor, name, 0))
        return np.uint64(tag << _TAG_SHIFT)

    def strays(self, lanes: Addresses, size: int) -> Addresses:
        """Those of the active lanes, of `size` bytes each, that are out of bounds."""
        low, high = int(lanes.min()), int(lanes.max())
        tag = low >> _TAG_SHIFT
        if 0 < tag <= len(self._arguments):
            own = self._arguments[tag - 1]
            if own.start <= low and high <= own.end - size:
                return lanes[:0]
        inside = np.zeros(lanes.shape, bool)
        for extent in (*self._arguments, *self._untagged):
            if extent.end - extent.start >= size:
                inside |= (lanes >= extent.start) & (lanes <= extent.end - size)
        return lanes[~inside]

    def describe(self, strays: Addresses, size: int) -> str:
        """Name the tensor nearest to the strays, and how far off the farthest of them is."""
        lane = max((int(strays.min()), int(strays.max())), key=lambda s: self._nearest(s, size)[0])
        distance, extent = self._nearest(lane, size)
        if extent is None:
            return "the launch was given no tensor"
        element = (lane - extent.start) // extent.itemsize
        count = (extent.end - extent.start) // extent.itemsize
        side = "past its end" if element >= 0 else "before its start"
        return (
            f"nearest is {extent.name}, which spans {count} elements: "
            f"element {element} lies {distance} bytes {side}"
        )

    def _nearest(self, lane: int, size: int) -> tuple[int, _Extent | None]:
        tag = lane >> _TAG_SHIFT
        own = self._arguments[tag - 1 : tag] if tag else self._untagged
        found = own or self._arguments
        return min(((e.distance(lane, size), e) for e in found), default=(0, None))


def _unwrapped(tensor: Any) -> Any:
    """The tensor inside what `triton.reinterpret` returns."""
    return tensor if isinstance(tensor, torch.Tensor) else tensor.base


def _tensors(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[int, str]]:
    for name, arg in named:
        if isinstance(arg, tuple):
            yield from _tensors((f"{name}[{i}]", item) for i, item in enumerate(arg))
        elif isinstance(arg, torch.Tensor):
            yield id(arg), name
        elif hasattr(arg, "base"):  # a reinterpreted tensor, or a descriptor of one
            yield from _tensors([(name, arg.base)])
