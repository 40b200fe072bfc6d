"""The numbers of result rows: time, floor, and the place beside other rows.

The floor under a case is the least time in which its compulsory bytes can be copied and its
operations be executed, at the rates in the row's ``roofs``: measured in the same run, or for a
prediction those that it rests on. Products of matrices are one more such rate. Where they take
longer than the other operations, they stand for so many of these as take as long.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import OPS
from .bench import load
from .gpus import GPUS
from .rows import Row

# What a clock of a measured row says, by the beginning of its columns' names.
CLOCKS = {
    "device": "device, cold L2",
    "warm": "device, warm L2",
    "eager": "eager, wall clock",
}
PROVIDERS = ("ours", "eager", "compile", "torchvision")


@dataclass(frozen=True)
class Point:
    """One row under its roofs. Rates are bytes and operations per second."""

    label: str
    provider: str
    bytes: float
    operations: float
    seconds: float
    copy: float
    peak: float
    predicted: bool
    by_products: bool = False  # operations are what products of matrices amount to

    @property
    def floor(self) -> float:
        return max(self.bytes / self.copy, self.operations / self.peak)

    @property
    def bound(self) -> str:
        """Which of them the floor is made of."""
        if self.bytes / self.copy >= self.operations / self.peak:
            return "bytes"
        return "matrix products" if self.by_products else "instructions"

    @property
    def share(self) -> float:
        """Of the floor's speed."""
        return self.floor / self.seconds

    @property
    def intensity(self) -> float:
        return self.operations / self.bytes

    @property
    def rate(self) -> float:
        return self.operations / self.seconds


def point(row: Row) -> Point | None:
    """A row's place under its roofs; None where it has no time, or its roofs were not measured."""
    roofs = row.get("roofs") or {}
    time, copy, peak = (
        seconds(row), roofs.get("copy_bytes_per_s"), roofs.get("instructions_per_s")
    )  # fmt: skip
    products, tensor = (
        row.get("products", 0),
        roofs.get(f"matmul_{row.get('precision')}_flop_per_s"),
    )
    if not (time and copy and peak) or (products and not tensor):
        return None
    equal = products * peak / tensor if products else 0.0
    return Point(
        label=label(row),
        provider=row["provider"],
        bytes=row["bytes"],
        operations=max(row["operations"], equal),
        seconds=time,
        copy=copy,
        peak=peak,
        predicted=row["kind"] == "predicted",
        by_products=equal > row["operations"],
    )


def seconds(row: Row, clock: str = "device") -> float | None:
    """The time of a row: the median of a clock, or what is predicted for the device's."""
    name = f"{clock}_p50_us"
    if row["kind"] == "predicted" and clock == "device":
        name = "predicted_us"
    time = row.get(name)
    return time / 1e6 if time else None


def label(row: Row) -> str:
    return f"{row['case']} {row['dtype']} {row['mode']}"


def same(row: Row) -> tuple[str, ...]:
    """Rows that agree in this are about the same work on the same GPU."""
    return (row["gpu"], row["op"], row["case"], row["mode"], row["dtype"])


def real(row: Row) -> bool:
    """Is this a case of a real network?"""
    return _place(row)[0] == 0


def _place(row: Row) -> tuple[int, int]:
    return _places(row["op"]).get(row["case"], (0, 0))


@functools.cache
def _places(op: str) -> dict[str, tuple[int, int]]:
    """Where the cases of an op stand: first those of real networks, then small ones and sweeps."""
    if op not in OPS:
        return {}
    bench = load(op)
    sets = enumerate((bench.cases, bench.small, bench.sweep))
    return {case.name: (k, i) for k, cases in sets for i, case in enumerate(cases)}


def ordered(rows: Iterable[Row]) -> list[Row]:
    """By op, case, dtype, mode and provider, as the benchmarks list them."""

    def place(row: Row) -> tuple[object, ...]:
        op, provider = row["op"], row["provider"]
        return (
            OPS.index(op) if op in OPS else len(OPS),
            op,
            _place(row),
            row["case"],
            row["dtype"],
            row["mode"],
            PROVIDERS.index(provider) if provider in PROVIDERS else len(PROVIDERS),
            provider,
        )

    return sorted(rows, key=place)


def of_kind(rows: Iterable[Row], kind: str) -> dict[str, list[Row]]:
    """The rows of a kind, in order, by GPU, those of ``gpus`` first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["gpu"], []).append(row)
    known = [gpu.name for gpu in GPUS.values()]
    gpus = sorted(
        found, key=lambda gpu: (gpu not in known, known.index(gpu) if gpu in known else gpu)
    )
    return {gpu: ordered(found[gpu]) if kind != "probe" else found[gpu] for gpu in gpus}


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


def rivals(row: Row, rows: Iterable[Row]) -> list[Row]:
    """The peers' rows about the same work, if they have a time."""
    return [
        peer
        for peer in rows
        if peer["kind"] == "measured"
        and peer["provider"] != "ours"
        and same(peer) == same(row)
        and not peer.get("left_out")
    ]


def ratio(peer: Row, row: Row, clock: str = "device") -> float | None:
    """How many times as long a peer takes: the speed-up over it."""
    theirs, mine = seconds(peer, clock), seconds(row, clock)
    return theirs / mine if theirs and mine else None


def status(rows: Sequence[Row], everything: Iterable[Row]) -> str:
    """What a title says of its rows, which are all of one kind."""
    if rows[0]["kind"] != "predicted":
        return "measured"
    measured = {same(r) for r in everything if r["kind"] == "measured" and seconds(r)}
    known = [same(row) in measured for row in rows]
    if not any(known):
        return "predicted, not yet measured"
    return "predicted" if all(known) else "predicted, in part not yet measured"


def source(rows: Sequence[Row]) -> str:
    """Where rows come from, in one line: driver, versions, commits and dates."""
    said = [
        f"{name} {values}"
        for name, column in (
            ("driver", "driver"), ("torch", "torch"), ("Triton", "triton"), ("commit", "commit")
        )
        if (values := _listed(row.get(column) for row in rows))
    ]  # fmt: skip
    dates = sorted({row["date"][:10] for row in rows})
    return ", ".join([*said, dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"])


def _listed(values: Iterable[object]) -> str:
    known = list(dict.fromkeys(str(value) for value in values if value is not None))
    if len(known) > 3:
        known = [*known[:2], f"{len(known) - 2} more"]
    return " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)


def digits(value: float) -> str:
    """Three digits that count, and no more than there are before the point."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, places in ((0.0995, 3), (9.995, 2), (99.95, 1)):
        if size < limit:
            return f"{value:.{places}f}" if size >= 0.0095 else f"{value:.2g}"
    return f"{value:,.0f}"


def si(value: float, unit: str = "") -> str:
    """A number with its thousands in the unit: 4.30 TB/s."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{digits(value / factor)} {prefix}{unit}"
    return f"{digits(value)} {unit}".rstrip()
