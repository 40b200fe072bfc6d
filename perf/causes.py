"""Where ours is slower than a peer, and what the recorded columns say about the cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .points import CLOCKS, digits, ordered, point, ratio, rivals, same, seconds, si
from .rows import Row

# Of the time on the device; where kernels take less of it, the gaps between them count.
_BUSY = 0.75

LIMITS = {
    "bytes": "bytes from DRAM",
    "instructions": "the issue of instructions",
    "special functions": "exponentials, logarithms and reciprocals",
    "matrix products": "products of matrices",
    "atomics": "additions in memory",
    "launches": "launches",
}


@dataclass(frozen=True)
class Loss:
    """A row of ours and a peer's that is faster by one clock at least."""

    row: Row
    peer: Row
    ratios: Mapping[str, float]  # by clock, the time of ours over the peer's

    @property
    def worst(self) -> float:
        return max(self.ratios.values())


def losses(rows: Sequence[Row]) -> list[Loss]:
    """The worst first."""
    found = []
    for row in ours_measured(rows):
        for peer in rivals(row, rows):
            if peer.get("unlike"):
                continue
            ratios = {clock: 1 / r for clock in CLOCKS if (r := ratio(peer, row, clock))}
            loss = Loss(row, peer, ratios)
            if ratios and loss.worst > 1:
                found.append(loss)
    return sorted(found, key=lambda loss: -loss.worst)


def ours_measured(rows: Iterable[Row]) -> list[Row]:
    return ordered(
        row
        for row in rows
        if row["kind"] == "measured" and row["provider"] == "ours" and not row.get("left_out")
    )


def cause(
    row: Row, rows: Sequence[Row], peer: Row | None = None, notes: Mapping[str, str] | None = None
) -> str:
    """Why a row is slower than a peer, in words, as far as what was recorded beside it tells.

    Args:
        peer: to compare with; by default the fastest on the device.
        notes: written by hand, by "op/case/mode/dtype"; such a note comes first.
    """
    peers = [p for p in rivals(row, rows) if seconds(p)]
    if peer is None and peers:
        peer = min(peers, key=lambda p: seconds(p) or 0)
    lost = {c for c in CLOCKS if peer is None or (ratio(peer, row, c) or 1) < 1}
    note = (notes or {}).get("/".join(row[name] for name in ("op", "case", "mode", "dtype")), "")
    said = [note]
    if lost - {"eager"}:
        said += _on_device(row)
    if "eager" in lost:
        said += _on_host(row)
    if peer is not None:
        said += _beside(row, peer, lost)
    if lost - {"eager"}:
        said += _by_model(row, rows)
    return " ".join(filter(None, said)) or "Nothing that was recorded explains it."


def _on_device(row: Row) -> Iterator[str]:
    device, kernels = 1e6 * (seconds(row) or 0), row.get("kernels") or {}
    busy = sum(kernels.values())
    if device and busy and busy < _BUSY * device:
        yield (
            f"The profiler sees kernels run for {digits(busy)} of {digits(device)} us; for the "
            "rest the GPU idles, "
            + ("waiting for the host." if row.get("clock") == "events" else "between kernels.")
        )
    if len(kernels) > 1 and busy:
        name, most = max(kernels.items(), key=lambda item: item[1])
        yield f"Of the kernels' time {name} takes {most / busy:.0%}."


def _on_host(row: Row) -> Iterator[str]:
    device, eager = (1e6 * (seconds(row, clock) or 0) for clock in ("device", "eager"))
    if device and eager > 2 * device:
        yield (
            f"For the caller a call takes {digits(eager)} us, and the device works for "
            f"{digits(device)} of them: it is the host that takes longest."
        )
    if waits := row.get("synchronisations"):
        yield f"A call waits for the GPU {_times(waits)}."


def _beside(row: Row, peer: Row, lost: Iterable[str]) -> Iterator[str]:
    """What differs from the peer."""
    name = peer["provider"]
    for clock in (c for c in CLOCKS if c in lost):
        low, high = row.get(f"{clock}_p20_us"), peer.get(f"{clock}_p80_us")
        if low and high and low <= high:
            yield f"The samples of the two overlap ({CLOCKS[clock]})."
    for column, what in (("launches", "kernels"), ("synchronisations", "waits for the GPU")):
        mine, theirs = row.get(column), peer.get(column)
        if mine is not None and theirs is not None and mine > theirs:
            yield f"{mine} {what} a call against {theirs} of {name}."
    mine, theirs = row.get("peak_memory"), peer.get("peak_memory")
    if mine and theirs and mine > 1.5 * theirs:
        yield f"It holds {si(mine, 'B')} beside its inputs, {name} {si(theirs, 'B')}."
    mine, theirs = row.get("sm_clock_mhz"), peer.get("sm_clock_mhz")
    if mine and theirs and mine < 0.97 * theirs:
        yield f"The GPU's clock was {mine:,.0f} MHz, and {theirs:,.0f} MHz for {name}."


def _by_model(row: Row, rows: Sequence[Row]) -> Iterator[str]:
    """What the floor and the prediction say."""
    placed = point(row)
    if placed and placed.share > 0.8:
        yield f"It is at {placed.share:.0%} of the floor, so that little is left to gain."
    for guess in rows:
        time = seconds(guess) if guess["kind"] == "predicted" and same(guess) == same(row) else None
        if time is None or not (device := seconds(row)):
            continue
        limit = LIMITS.get(guess["limit"], guess["limit"])
        yield f"The prediction is {digits(time * 1e6)} us, limited by {limit}" + (
            f"; it takes {device / time:.1f} times that, which the model does not explain."
            if device > 2 * time
            else ", which accounts for it."
        )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
