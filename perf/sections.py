"""The sections of the report, as HTML, each from rows alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from . import machine, marks, plots, roofline
from .causes import Loss, cause, losses, ours_measured
from .ink import Picture, svg
from .page import Cell, Column, pill, table
from .points import (
    CLOCKS,
    by_op,
    digits,
    label,
    of_kind,
    ordered,
    point,
    ratio,
    real,
    rivals,
    same,
    seconds,
    si,
    source,
    status,
)
from .probe import ROOFS
from .rows import Row

_WORK = (Column("case", words=True), Column("dtype", words=True), Column("mode", words=True))
_OP = Column("op", words=True)


def _work(row: Row) -> list[Cell | str]:
    return [row["case"], row["dtype"], row["mode"]]


def caption(name: str, rows: Sequence[Row], everything: Sequence[Row]) -> str:
    """What a table shows, whether it was measured, and where from."""
    return (
        f"{escape(name)} {pill(status(rows, everything))}"
        f'<div class="source">{escape(rows[0]["gpu"])}; {escape(source(rows))}; '
        f"{commands(rows)}</div>"
    )


def commands(rows: Sequence[Row]) -> str:
    found = list(dict.fromkeys(str(row["command"]) for row in rows))
    shown = ", ".join(f"<code>{escape(command)}</code>" for command in found[:3])
    return shown + (f" and {len(found) - 3} more" if len(found) > 3 else "")


# --- cells -----------------------------------------------------------------------------------


def number(value: float | None, write: Callable[[float], str] = digits, kind: str = "") -> Cell:
    return Cell("") if value is None else Cell(write(value), value, kind)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _us(row: Row, clock: str = "device") -> Cell:
    time = seconds(row, clock)
    return number(None if time is None else time * 1e6)


def _share(row: Row) -> Cell:
    placed = point(row)
    return number(None if placed is None else 100 * placed.share, lambda v: f"{digits(v)} %")


def speed_up(factor: float | None) -> Cell:
    if factor is None:
        return Cell("")
    return Cell(f"{factor:.2f}x", factor, "alert" if factor < 1 else "")


def _factor(value: float | None) -> Cell:
    """Ours over a peer: a number above 1 is a loss."""
    return number(value, lambda v: f"{v:.2f}x", "alert" if value and value > 1 else "soft")


# --- measured --------------------------------------------------------------------------------


def slower(rows: Sequence[Row], notes: Mapping[str, str]) -> str:
    """What speaks against ours; "" if nothing was measured."""
    if not any(row["kind"] == "measured" for row in rows):
        return ""
    found = losses(rows)
    parts = [_losses(rows, [x for x in found if x.row["gpu"] == gpu], notes)
             for gpu in dict.fromkeys(x.row["gpu"] for x in found)]  # fmt: skip
    if not found:
        words = "No row of ours is slower than a peer's, by any of the clocks."
        parts.append(f"<p>{words} {pill('measured')}</p>")
    refused = [
        row
        for row in rows
        if row["kind"] == "measured" and row["provider"] == "ours" and row.get("left_out")
    ]
    if refused:
        columns = (_OP, *_WORK, Column("GPU", words=True), Column("reason", words=True))
        lines = [
            [row["op"], *_work(row), row["gpu"], Cell(str(row["left_out"]), kind="long alert")]
            for row in ordered(refused)
        ]
        parts.append(table(columns, lines, caption("Ours was left out", refused, rows)))
    return "\n".join(parts)


def _losses(rows: Sequence[Row], found: Sequence[Loss], notes: Mapping[str, str]) -> str:
    """What one GPU's measurements say against ours, the worst first."""
    columns = (
        Column("work", words=True), Column("slower than", words=True),
        *(Column(words, "time of ours over the peer's") for words in CLOCKS.values()),
        Column("cause, by what was recorded", words=True),
    )  # fmt: skip
    lines = [
        [
            Cell(f"{loss.row['op']} {label(loss.row)}", kind="wrap"), loss.peer["provider"],
            *(_factor(loss.ratios.get(clock)) for clock in CLOCKS),
            Cell(cause(loss.row, rows, loss.peer, notes), kind="long"),
        ]
        for loss in found
    ]  # fmt: skip
    name = "Comparisons that ours loses: time of ours over the peer's"
    return table(columns, lines, caption(name, [loss.row for loss in found], rows))


def summary(rows: Sequence[Row], everything: Sequence[Row]) -> str:
    """A table for each op of one GPU: the cases of real networks, against each peer."""
    parts = []
    for op, members in by_op(r for r in ours_measured(rows) if real(r)).items():
        names = marks.peers(row for row in rows if row["op"] == op)
        columns = (
            *_WORK,
            Column("device us", "median, cold L2"), Column("of floor"),
            Column("made of", "what decides the floor", words=True),
            Column("warm us", "median, warm L2"), Column("eager us", "wall clock of a call"),
            *(Column(f"over {name}", "time on the device, peer over ours") for name in names),
        )  # fmt: skip
        lines = []
        for row in members:
            peers = {peer["provider"]: peer for peer in rivals(row, rows)}
            placed = point(row)
            lines.append(
                [
                    *_work(row), _us(row), _share(row), placed.bound if placed else "",
                    _us(row, "warm"), _us(row, "eager"),
                    *(
                        speed_up(ratio(peers[name], row)) if name in peers else Cell("left out",
                        kind="soft") for name in names
                    ),
                ]
            )  # fmt: skip
        parts.append(table(columns, lines, caption(f"{op}: cases of real networks", members,
                                                   everything)))  # fmt: skip
    return "\n".join(parts)


def roofs(gpu: str, rows: Sequence[Row]) -> str:
    """Measured rates beside the makers'; of probes, or else of the newest measurement."""
    of_gpu = [row for row in rows if row.get("gpu") == gpu and row.get("roofs")]
    probes = [row for row in of_gpu if row["kind"] == "probe"]
    newest = max(
        probes or [row for row in of_gpu if row["kind"] == "measured"],
        key=lambda row: str(row["date"]),
        default=None,
    )
    if newest is None:
        return ""
    known = machine.known(gpu)
    lines: list[list[Cell | str]] = []
    for name, roof in ROOFS.items():
        value = newest["roofs"].get(name)
        says = roof.maker_says(known) if known and roof.maker_says else None
        lines.append(
            [
                roof.words,
                Cell("absent", kind="soft") if value is None else _rate(name, value),
                Cell("") if says is None else _rate(name, says),
                number(value / says if value and says else None, lambda v: f"{v:.0%}"),
            ]
        )
    columns = (
        Column("roof", words=True), Column("measured"), Column("datasheet", "perf/gpus.py"),
        Column("measured of datasheet"),
    )  # fmt: skip
    return table(columns, lines, caption("Roofs beside the datasheet", [newest], rows))


def _rate(name: str, value: float) -> Cell:
    if name.endswith("_us"):
        return number(value, lambda v: f"{digits(v)} us")
    unit = {"bytes": "B/s", "flop": "FLOP/s"}.get(name.split("_")[-3], "/s")
    return number(value, lambda v: si(v, unit))


def figures(pictures: Sequence[Picture | str], rows: Sequence[Row]) -> str:
    """The pictures, and why others are missing."""
    drawn = "\n".join(
        f"<figure>\n{svg(p, alone=False)}\n<figcaption>{commands(rows)}</figcaption></figure>"
        for p in pictures
        if isinstance(p, Picture)
    )
    return drawn + "\n".join(
        f'<p class="soft">{escape(p)}.</p>' for p in pictures if isinstance(p, str)
    )


def everything(gpu: str, rows: Sequence[Row]) -> str:
    """All measured rows of a GPU, those that lose and those that were left out among them."""
    members = of_kind(rows, "measured")[gpu]
    columns = (
        _OP, *_WORK, Column("provider", words=True), Column("device us", "median, cold L2"),
        Column("p20"), Column("p80"), Column("warm us", "median, warm L2"),
        Column("eager us", "median, wall clock of a call"), Column("of floor"),
        Column("speed-up", "of ours over this peer, device, cold L2"), Column("launches"),
        Column("waits", "for the GPU, a call"), Column("MB held", "beside the inputs, at most"),
        Column("first call s", "with compilation"), Column("error", "relative, in norm"),
        Column("clock", words=True), Column("samples"), Column("SM MHz"), Column("memory MHz"),
        Column("deg C"), Column("W"), Column("left out because", words=True),
    )  # fmt: skip
    ours = {same(row): row for row in ours_measured(members)}
    lines = [_line(row, ours.get(same(row))) for row in members]
    return table(columns, lines, caption("Every measured row", members, rows))


def _line(row: Row, ours: Row | None) -> list[Cell | str]:
    memory = row.get("peak_memory")
    is_peer = ours is not None and row["provider"] != "ours"
    return [
        row["op"], *_work(row), row["provider"],
        Cell("left out", kind="soft") if row.get("left_out") else _us(row),
        number(row.get("device_p20_us")), number(row.get("device_p80_us")),
        _us(row, "warm"), _us(row, "eager"), _share(row),
        speed_up(ratio(row, ours) if is_peer and ours else None),
        *(number(row.get(name), _whole) for name in ("launches", "synchronisations")),
        number(None if memory is None else memory / 1e6),
        number(row.get("first_call_s")), number(row.get("error"), lambda v: f"{v:.0e}"),
        str(row.get("clock") or ""),
        *(
            number(row.get(name), _whole)
            for name in ("samples", "sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w")
        ),
        Cell(str(row.get("left_out") or ""), kind="soft"),
    ]  # fmt: skip


# --- predicted -------------------------------------------------------------------------------


def predictions(gpu: str, rows: Sequence[Row]) -> str:
    """A GPU's predicted cases and the kernels behind them."""
    members = of_kind(rows, "predicted")[gpu]
    return "\n".join((_cases(members, rows), _kernels(members, rows)))


def _cases(members: Sequence[Row], rows: Sequence[Row]) -> str:
    columns = (
        _OP, *_WORK, Column("predicted us"), Column("limited by", words=True), Column("of floor"),
        Column("compulsory"), Column("requested", "bytes asked for over the compulsory ones"),
        Column("sectors", "bytes of 32-byte sectors over the compulsory ones"),
        Column("launches"), Column("MB held", "beside the inputs, at most; counted"),
    )  # fmt: skip
    lines = []
    for row in members:
        small, memory = row.get("small_bytes"), row.get("peak_memory")
        traffic = [
            number(row[name] / small if small and row.get(name) else None, lambda v: f"{v:.2f}x")
            for name in ("requested_bytes", "sector_bytes")
        ]
        lines.append(
            [
                row["op"], *_work(row), _us(row), str(row["limit"]),
                _share(row), number(row["bytes"], lambda v: si(v, "B")), *traffic,
                number(row.get("launches"), _whole),
                number(None if memory is None else memory / 1e6),
            ]
        )  # fmt: skip
    return table(columns, lines, caption("Cases", members, rows))


def _kernels(members: Sequence[Row], rows: Sequence[Row]) -> str:
    columns = (
        Column("kernel", words=True), Column("constants", words=True),
        Column("first launched by", words=True), Column("registers"), Column("spilled"),
        Column("stack"), Column("shared"), Column("warps"), Column("occupancy"),
        Column("instructions", "per element"), Column("special", "functions per element"),
        Column("us", "in that case"), Column("limited by", words=True),
    )  # fmt: skip
    lines = [
        [
            kernel["kernel"], Cell(_constants(kernel), kind="long"),
            f"{row['op']} {row['case']} {row['dtype']} {row['mode']}",
            *(number(kernel.get(name), _whole)
              for name in ("registers", "spilled", "stack", "shared", "warps")),
            number(kernel.get("occupancy"), lambda v: f"{v:.0%}"),
            number(kernel.get("per_element")), number(kernel.get("special_per_element")),
            number(kernel.get("us")),
            Cell(f"not compiled: {kernel['error']}", kind="long alert") if kernel.get("error")
            else str(kernel["limit"]),
        ]
        for row, kernel in _distinct(members)
    ]  # fmt: skip
    return table(columns, lines, caption("Kernels", members, rows))


def _distinct(members: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Each kernel once, with the first row that launches it."""
    seen = set()
    for row in members:
        for kernel in row.get("kernels") or ():
            key = json.dumps([kernel["kernel"], kernel.get("constants"), row["dtype"]])
            if key not in seen:
                seen.add(key)
                yield row, kernel


def _constants(kernel: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in (kernel.get("constants") or {}).items())


def judged(gpu: str, rows: Sequence[Row]) -> str:
    """Predictions beside measurements; "" where no case has both."""
    predicted, measured = (of_kind(rows, kind).get(gpu, []) for kind in ("predicted", "measured"))
    pairs = plots.matched(predicted, measured)
    if not pairs:
        return ""
    columns = (
        _OP, *_WORK, Column("predicted us"), Column("limited by", words=True),
        Column("measured us", "device, cold L2"), Column("measured over predicted"),
    )  # fmt: skip
    lines = []
    for guess, truth in pairs:
        factor = (seconds(truth) or 0) / (seconds(guess) or 1)
        kind = "" if 0.5 <= factor <= 2 else "alert"
        limit = str(guess["limit"])
        times = number(factor, lambda v: f"{v:.2f}x", kind)
        lines.append([guess["op"], *_work(guess), _us(guess), limit, _us(truth), times])
    words = (
        f'Predicted against measured {pill("predicted")} {pill("measured")}<div class="source">'
        f"{escape(gpu)}; predicted: {escape(source([p for p, _ in pairs]))}; "
        f"{commands([p for p, _ in pairs])}; measured: {escape(source([m for _, m in pairs]))}; "
        f"{commands([m for _, m in pairs])}</div>"
    )
    picture = plots.against(gpu, predicted, measured)
    return figures([picture], [row for pair in pairs for row in pair]) + table(
        columns, lines, words
    )


def drawn(gpu: str, kind: str, rows: Sequence[Row]) -> str:
    members = [row for row in of_kind(rows, kind)[gpu] if seconds(row)]
    return figures(list(roofline.of_gpu(gpu, members, rows)), members)
