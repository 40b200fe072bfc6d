"""Losses of DTensors: each rank finds those of its rows, and says that it has a part.

Imported with the first DTensor, since ``torch.distributed.tensor`` takes its time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from . import _checks


class Rows:
    """The layout of a DTensor ``t``, the argument ``name``, whose dimension ``dim`` is whole."""

    def __init__(self, name: str, t: Any, dim: int):
        self.name, self.dims, self.dim = name, t.dim(), dim % max(t.dim(), 1)
        self.mesh, self.placements = t.device_mesh, tuple(t.placements)
        for p in self.placements:
            strided = hasattr(p, "split_factor")  # parts that take turns: not those of Shard
            if not (p.is_replicate() or (p.is_shard() and p.dim != self.dim and not strided)):
                raise ValueError(
                    f"{name} must be a DTensor that is Replicate() or Shard() of another dimension "
                    f"than {self.dim}, got {self.placements}: use {name}.redistribute"
                )

    def local(self, name: str, t: Any) -> Any:
        """This rank's part of an argument that has a value for each row, or for each element."""
        if t is None:
            return None
        if not _checks.distributed(t):
            raise TypeError(
                f"{name} must be a DTensor, as {self.name} is, got {type(t).__name__}: use "
                "torch.distributed.tensor.distribute_tensor"
            )
        placements = self.placements if t.dim() == self.dims else self._without_dim()
        return t.redistribute(self.mesh, placements).to_local()

    def total(self, part: Tensor) -> Tensor:
        """The sum of the ranks' parts."""
        return self.loss(part, None).full_tensor()

    def loss(self, part: Tensor, shape: torch.Size | None) -> Any:
        """The DTensor of which ``part`` is this rank's: of that shape, or by None a sum."""
        if shape is None:
            summed = [Partial() if p.is_shard() else p for p in self.placements]
            return DTensor.from_local(part, self.mesh, summed, run_check=False)
        placements = self.placements if len(shape) == self.dims else self._without_dim()
        stride = [1]
        for size in reversed(shape[1:]):
            stride.insert(0, stride[0] * size)
        return DTensor.from_local(
            part.contiguous(),
            self.mesh,
            placements,
            run_check=False,
            shape=shape,
            stride=tuple(stride[: len(shape)]),
        )

    def _without_dim(self) -> list[Any]:
        return [
            Shard(p.dim - (p.dim > self.dim)) if isinstance(p, Shard) else p
            for p in self.placements
        ]


def whole(value: Any) -> Any:
    """What every rank needs whole: a number, a plain tensor that all have, or a DTensor's."""
    return value.full_tensor() if _checks.distributed(value) else value
