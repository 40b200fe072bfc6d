"""The first pass of GHM: counts of the bins, and the table that their weights make."""

import triton
import triton.language as tl


@triton.jit
def add_counts(counts, key, soft, THRESHOLDS: tl.constexpr, EDGES: tl.constexpr):
    """``counts``, with how many keys reach bin k added in slot k; a NaN reaches none.

    A comparison with a Python number would round that to fp32.
    """
    slot = tl.arange(0, counts.shape[0])
    counts += tl.where(slot == 0, tl.sum((key == key).to(tl.int32), axis=0), 0)
    if soft is None:
        highest = tl.max(tl.where(key == key, key, float("-inf")), axis=0)
        for k in tl.static_range(len(THRESHOLDS)):
            threshold = tl.full((), THRESHOLDS[k], key.dtype)
            if highest >= threshold:
                reach = tl.sum((key >= threshold).to(tl.int32), axis=0)
                counts += tl.where(slot == k + 1, reach, 0)
    else:
        for k in tl.static_range(len(THRESHOLDS)):
            threshold = tl.full((), THRESHOLDS[k], key.dtype)
            reaches = tl.where(soft, key >= EDGES[k + 1], key >= threshold)
            counts += tl.where(slot == k + 1, tl.sum(reaches.to(tl.int32), axis=0), 0)
    return counts


@triton.jit
def _filled(VALUES: tl.constexpr, FIRST: tl.constexpr, SLOTS: tl.constexpr):
    """fp64 [SLOTS]: VALUES from slot FIRST on, before them -inf and after them inf."""
    slot = tl.arange(0, SLOTS)
    out = tl.full((SLOTS,), float("inf"), tl.float64)
    if FIRST == 1:
        out = tl.where(slot == 0, float("-inf"), out)
    for k in tl.static_range(len(VALUES)):
        out = tl.where(slot == FIRST + k, VALUES[k], out)
    return out


@triton.jit
def write_table(
    count,  # fp64 [SLOTS]
    total,
    table_ptr,
    acc_ptr,
    steps_ptr,
    THRESHOLDS: tl.constexpr,
    EDGES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    UPDATE: tl.constexpr,
):
    SLOTS: tl.constexpr = count.shape[0]
    slot = tl.arange(0, SLOTS)
    some = (count > 0) & (slot <= len(THRESHOLDS))
    mass = count
    if acc_ptr is not None:
        known = slot <= len(THRESHOLDS)
        acc = tl.load(acc_ptr + slot, mask=known, other=0)
        mass = MOMENTUM * acc.to(tl.float64) + (1 - MOMENTUM) * count
        new = mass.to(acc.dtype)
        if UPDATE:
            tl.store(acc_ptr + slot, new, mask=some)
        mass = new.to(tl.float64)
        if steps_ptr is not None:
            steps = tl.load(steps_ptr + slot, mask=known, other=0) + 1
            if UPDATE:
                tl.store(steps_ptr + slot, steps, mask=some)
            # The first steps of a bin hold 1 - momentum^steps of the whole.
            log = tl.log(tl.full((SLOTS,), MOMENTUM, tl.float64))
            mass /= 1 - tl.exp(steps.to(tl.float64) * log)
    total = tl.maximum(total, 1.0, propagate_nan=tl.PropagateNan.ALL)
    bins = tl.sum(some.to(tl.float64), axis=0)
    weight = tl.where(some, total / (mass * bins), 0.0)
    # An infinite key reaches beyond the last bin, and belongs to it.
    last = tl.sum(tl.where(slot == len(THRESHOLDS), weight, 0.0), axis=0)
    weight = tl.where(slot == len(THRESHOLDS) + 1, last, weight)
    ACC: tl.constexpr = table_ptr.dtype.element_ty
    tl.store(table_ptr + slot, weight.to(ACC))
    tl.store(table_ptr + SLOTS + slot, _filled(THRESHOLDS, 1, SLOTS).to(ACC))
    tl.store(table_ptr + 2 * SLOTS + slot, _filled(EDGES, 0, SLOTS).to(ACC))
    tl.store(table_ptr + 3 * SLOTS, total.to(ACC))


@triton.jit
def hand_over(
    counts,  # int32 [SLOTS]: how many keys reach a bin, and after those of the bins how many count
    total,  # this program's share of the label weights, or None: the elements that count are
    table_ptr,
    acc_ptr,
    steps_ptr,
    tally_ptr,
    THRESHOLDS: tl.constexpr,
    EDGES: tl.constexpr,
    RULE: tl.constexpr,
):
    """Add this program's counts; the last program of all makes the table of their sums."""
    SLOTS: tl.constexpr = counts.shape[0]
    BINS: tl.constexpr = len(THRESHOLDS) + 1
    AT: tl.constexpr = SLOTS if RULE is None else 3 * SLOTS + 1
    slot = tl.arange(0, SLOTS)
    programs = tl.num_programs(0)
    tl.atomic_add(tally_ptr + slot, counts.to(tl.int64), mask=counts != 0, sem="relaxed")
    if total is not None:
        tl.store(table_ptr + AT + tl.program_id(0), total)
    # Every thread's part, before one of them says that it is done.
    tl.debug_barrier()
    if tl.atomic_add(tally_ptr + SLOTS, 1, sem="acq_rel") == programs - 1:
        reach = tl.load(tally_ptr + slot, cache_modifier=".cg")
        beyond = tl.load(tally_ptr + slot + 1, mask=slot < BINS - 1, other=0, cache_modifier=".cg")
        count = tl.where(slot < BINS, reach - beyond, 0).to(tl.float64)
        whole = tl.sum(tl.where(slot == BINS, reach, 0), axis=0).to(tl.float64)
        if total is not None:
            CHUNK: tl.constexpr = 1024
            sums = tl.zeros((CHUNK,), tl.float64)
            for i in range(0, programs, CHUNK):
                lane = i + tl.arange(0, CHUNK)
                sums += tl.load(
                    table_ptr + AT + lane, mask=lane < programs, other=0, cache_modifier=".cg"
                ).to(tl.float64)
            whole = tl.sum(sums, axis=0)
        # Zero again, for the next launch; nobody reads before all have read.
        tl.debug_barrier()
        tl.store(tally_ptr + slot, tl.zeros((SLOTS,), tl.int64))
        tl.store(tally_ptr + SLOTS, 0)
        if RULE is None:
            tl.store(table_ptr + slot, tl.where(slot == BINS, whole, count))
        else:
            write_table(
                count, whole, table_ptr, acc_ptr, steps_ptr, THRESHOLDS, EDGES, RULE[0], RULE[1]
            )
