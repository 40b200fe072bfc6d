"""GHM's first pass: the launch of its kernels, and the table of what an element weighs.

``mu`` is None for GHM-C. A table is the weights of the bins and what the second pass needs to find
an element's bin; its last element is the total.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _dispatch, _losses, _vmap
from ._settings import Settings
from .kernels.ghm import (
    NONE,
    PER_ELEMENT,
    PER_ROW,
    ghm_count_kernel,
    ghm_count_rows_kernel,
    ghm_table_kernel,
)
from .reference import ghm as reference

# Small blocks, few of which hold a positive. BLOCKS are a program's, at most 31.
COUNT_ROWS = Settings(
    "ghm_count_rows",
    fp32={"BLOCK": 1024, "BLOCKS": 8, "num_warps": 1},
    fp64={"BLOCK": 512, "BLOCKS": 8, "num_warps": 2},
)
COUNT = Settings(
    "ghm_count", fp32={"BLOCK": 1024, "num_warps": 4}, fp64={"BLOCK": 512, "num_warps": 4}
)

_MOST_CLASSES = 1 << 23  # of the kernels for rows, which count a row's elements in 32 bits
_MOST_BLOCKS = 31
_PROGRAMS = 8192  # with more, a program takes more blocks

State = tuple[Tensor | None, Tensor | None]  # acc_sum, and how often its bins were updated


def _slots(bins: int) -> int:
    return _dispatch.next_power_of_2(bins + 1)


def _table_size(bins: int) -> int:
    return 3 * _slots(bins) + 1


@functools.cache
def _constants(mu: float | None, bins: int, double: bool) -> dict[str, tuple[float, ...]]:
    edges = tuple(map(float, reference.edges(bins, mu)))
    return {"THRESHOLDS": reference.thresholds(bins, mu, double), "EDGES": edges}


class Launch:
    """How memory holds the arguments, and what that asks of a kernel."""

    def __init__(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None,
        mu: float | None,
        bins: int,
        settings: Settings,
        for_rows: Settings | None,
    ):
        """``for_rows``: settings of a kernel for labels of contiguous rows, if there is one."""
        self.layout = layout = _losses.by_class(pred, -1)
        ptx = _dispatch.inline_ptx(pred.device)
        weights, weight = NONE, label_weight
        if weight is not None:
            # Expanded over the classes, as mmdet does it.
            if weight.dim() == pred.dim() and weight.dim() and weight.stride(-1) == 0:
                weight = weight[..., 0]
            weights = PER_ELEMENT if weight.dim() == pred.dim() else PER_ROW
            weight = layout.per_row(weight) if weights is PER_ROW else layout.per_element(weight)
        labels = target.dim() < pred.dim()
        target = layout.per_row(target) if labels else layout.per_element(target)
        self.tensors = (layout.logits, target, weight)
        self.rows = (
            for_rows is not None
            and labels
            and layout.inner == 1
            and weights is not PER_ELEMENT
            and layout.classes <= _MOST_CLASSES
        )
        self.settings = dict((for_rows if for_rows and self.rows else settings).on(pred))
        block, self.n = self.settings["BLOCK"], pred.numel()
        self.programs = blocks = _dispatch.cdiv(self.n, block)
        if self.rows:
            owned = max(self.settings.pop("BLOCKS"), _dispatch.cdiv(blocks, _PROGRAMS))
            self.programs = _dispatch.cdiv(blocks, min(owned, _MOST_BLOCKS))
            self.sizes: tuple[int, ...] = (self.n, layout.classes)
            self.constants: dict[str, Any] = {"PTX": ptx, "SLOTS": _slots(bins)}
        else:
            if layout.classes * layout.inner > 1 << 30:
                raise ValueError(
                    f"pred must have at most 2**30 elements between two rows, got "
                    f"{layout.classes * layout.inner}: pass pred.contiguous()"
                )
            targets = PER_ROW if labels else PER_ELEMENT
            self.sizes = (self.n, layout.classes, layout.inner)
            soft = mu is None and not labels
            kind = (mu, bins, targets.value, weights.value, ptx, _slots(bins), soft)
            self.constants = {"KIND": kind}

    def __call__(self, kernel: Any, *args: Any, **constants: Any) -> None:
        _dispatch.launch(
            kernel,
            (self.programs,),
            *self.tensors,
            *args,
            **constants,
            **self.constants,
            **self.settings,
        )


def _alloc_table(pred: Tensor, bins: int) -> Tensor:
    return pred.new_empty(_table_size(bins), dtype=_dispatch.compute_dtype(pred.dtype))


def _alloc_totals(pred: Tensor, bins: int) -> Tensor:
    return pred.new_empty(_slots(bins), dtype=torch.float64)


def _count(
    out: Tensor,
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    state: State,
    mu: float | None,
    bins: int,
    rule: tuple[float, bool] | None,
) -> Tensor:
    if pred.numel() == 0:
        return out.zero_()
    launch = Launch(pred, target, label_weight, mu, bins, COUNT, COUNT_ROWS)
    size = len(out)
    if mu is not None and label_weight is not None:
        # Behind it, the programs' sums of the label weights.
        out = out.new_empty(size + launch.programs)
    launch(
        ghm_count_rows_kernel if launch.rows else ghm_count_kernel,
        out,
        *state,
        _dispatch.counter(pred.device, _slots(bins) + 1, torch.int64),
        *launch.sizes,
        RULE=rule,
        enable_fp_fusion=False,  # which bin an element is in is exact
        **_constants(mu, bins, pred.dtype == torch.float64),
    )
    return out[:size]


def _launch_table(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    acc_sum: Tensor | None,
    steps: Tensor | None,
    mu: float | None,
    bins: int,
    momentum: float,
    update: bool,
) -> Tensor:
    state, rule = (acc_sum, steps), (momentum, update)
    return _count(_alloc_table(pred, bins), pred, target, label_weight, state, mu, bins, rule)


def _launch_totals(
    pred: Tensor, target: Tensor, label_weight: Tensor | None, mu: float | None, bins: int
) -> Tensor:
    out = _alloc_totals(pred, bins)
    return _count(out, pred, target, label_weight, (None, None), mu, bins, None)


def _alloc_from(totals: Tensor, bins: int, double: bool) -> Tensor:
    dtype = torch.float64 if double else torch.float32
    return totals.new_empty(_table_size(bins), dtype=dtype)


def _launch_table_from(
    totals: Tensor,
    acc_sum: Tensor | None,
    steps: Tensor | None,
    mu: float | None,
    bins: int,
    momentum: float,
    update: bool,
    double: bool,
) -> Tensor:
    table = _alloc_from(totals, bins, double)
    _dispatch.launch(
        ghm_table_kernel,
        (1,),
        table,
        totals,
        acc_sum,
        steps,
        RULE=(momentum, update),
        SLOTS=_slots(bins),
        enable_fp_fusion=True,
        num_warps=1,
        **_constants(mu, bins, double),
    )
    return table


def arrays(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else _dispatch.to_numpy(t) for t in tensors]


def _reference_totals(
    pred: Tensor, target: Tensor, label_weight: Tensor | None, mu: float | None, bins: int
) -> Tensor:
    x, t, weight = arrays(pred, target, label_weight)
    counts, total = reference.count(x, t, weight, mu, bins)
    out = _alloc_totals(pred, bins).zero_()
    out[: bins + 1] = torch.from_numpy(np.append(counts, total))
    return out


def _reference_table_from(
    totals: Tensor,
    acc_sum: Tensor | None,
    steps: Tensor | None,
    mu: float | None,
    bins: int,
    momentum: float,
    update: bool,
    double: bool,
) -> Tensor:
    counts = _dispatch.to_numpy(totals)
    acc, updates = arrays(acc_sum, steps)
    weights, *state = reference.weights_of(counts[:bins], counts[bins], acc, momentum, updates)
    if update:
        for t, new in zip((acc_sum, steps), state, strict=True):
            if t is not None:
                t.copy_(torch.from_numpy(new))
    table = _alloc_from(totals, bins, double).zero_()
    table[:bins] = torch.from_numpy(weights)
    table[-1] = max(counts[bins], 1.0)
    return table


def _reference_table(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    acc_sum: Tensor | None,
    steps: Tensor | None,
    mu: float | None,
    bins: int,
    momentum: float,
    update: bool,
) -> Tensor:
    totals = _reference_totals(pred, target, label_weight, mu, bins)
    double = pred.dtype == torch.float64
    return _reference_table_from(totals, acc_sum, steps, mu, bins, momentum, update, double)


# torch.compile does not take an op that may mutate arguments which are all None: inductor fails. So
# each has a form without state.
_IN_PLACE = _vmap.refused(
    "torch.vmap does not take GHM losses with momentum, whose counts are updated in place"
)
table_of = _dispatch.register(
    "ghm_table(Tensor pred, Tensor target, Tensor? label_weight, float? mu, int bins) -> Tensor",
    lambda pred, target, label_weight, mu, bins: _launch_table(
        pred, target, label_weight, None, None, mu, bins, 0.0, False
    ),
    lambda pred, target, label_weight, mu, bins: _reference_table(
        pred, target, label_weight, None, None, mu, bins, 0.0, False
    ),
    lambda pred, target, label_weight, mu, bins: _alloc_table(pred, bins),
)
averaged_table_of = _dispatch.register(
    "ghm_averaged_table(Tensor pred, Tensor target, Tensor? label_weight, Tensor(a!) acc_sum, "
    "Tensor(b!)? steps, float? mu, int bins, float momentum, bool update) -> Tensor",
    _launch_table,
    _reference_table,
    lambda pred, target, label_weight, acc_sum, steps, mu, bins, *_: _alloc_table(pred, bins),
    vmap=_IN_PLACE,
)
totals_of = _dispatch.register(
    "ghm_totals(Tensor pred, Tensor target, Tensor? label_weight, float? mu, int bins) -> Tensor",
    _launch_totals,
    _reference_totals,
    lambda pred, target, label_weight, mu, bins: _alloc_totals(pred, bins),
)
table_from = _dispatch.register(
    "ghm_table_from(Tensor totals, float? mu, int bins, bool double) -> Tensor",
    lambda totals, mu, bins, double: _launch_table_from(
        totals, None, None, mu, bins, 0.0, False, double
    ),
    lambda totals, mu, bins, double: _reference_table_from(
        totals, None, None, mu, bins, 0.0, False, double
    ),
    lambda totals, mu, bins, double: _alloc_from(totals, bins, double),
)
averaged_table_from = _dispatch.register(
    "ghm_averaged_table_from(Tensor totals, Tensor(a!) acc_sum, Tensor(b!)? steps, float? mu, "
    "int bins, float momentum, bool update, bool double) -> Tensor",
    _launch_table_from,
    _reference_table_from,
    lambda totals, acc_sum, steps, mu, bins, momentum, update, double: _alloc_from(
        totals, bins, double
    ),
    vmap=_IN_PLACE,
)
