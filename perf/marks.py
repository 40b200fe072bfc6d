"""What the marks of all pictures mean, and the paper that they stand on.

Colour is the op, the shape of a full mark the dtype. Predictions are hollow. Peers are strokes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import atan2, degrees, log10
from typing import Any

from .ink import Ink
from .points import PROVIDERS, real
from .rows import Row

DTYPE_MARKS = {"bf16": "o", "fp16": "s", "fp32": "D"}
PEER_MARKS = {"eager": "x", "compile": "+", "torchvision": "1"}
MODE_LINES = {"fwd": "-", "fwd+bwd": (0, (4, 2))}


def mark(row: Row, ink: Ink, peer: str = "op") -> dict[str, Any]:
    """How one row is marked; ``peer``: the colour of peers, a role or that of the op."""
    if row["provider"] != "ours":
        return {
            "color": ink.of(row["op"], "measured") if peer == "op" else ink[peer],
            "marker": PEER_MARKS.get(row["provider"], "|"),
            "markersize": 4.5,
            "markeredgewidth": 0.9,
            "alpha": 0.6,
            "linestyle": "none",
        }
    colour = ink.of(row["op"], row["kind"])
    hollow = row["kind"] == "predicted"
    shape = DTYPE_MARKS.get(row["dtype"], "P")
    return {
        "color": colour,
        "marker": shape,
        "markersize": 5.2 if shape == "D" else 6.2,
        "markerfacecolor": "none" if hollow else colour,
        "markeredgecolor": colour if hollow else ink["ground"],
        "markeredgewidth": 1.2 if hollow else 0.6,
        "linestyle": "none",
    }


def legend(
    figure: Any,
    ink: Ink,
    rows: Sequence[Row],
    ops: bool = True,
    more: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Below all axes: what of colours, shapes and strokes is in use.

    ``more``: further names, each with what is special about its line.
    """
    from matplotlib.lines import Line2D

    ours = [row for row in rows if row["provider"] == "ours"]
    entries: list[tuple[str, dict[str, Any]]] = []
    if ops:
        for op in dict.fromkeys(row["op"] for row in rows):
            kind = "predicted" if all(row["kind"] == "predicted" for row in rows) else "measured"
            entries.append((op, {"color": ink.of(op, kind), "linewidth": 4.5}))
    for dtype in (d for d in DTYPE_MARKS if any(row["dtype"] == d for row in ours)):
        shown = mark(next(row for row in ours if row["dtype"] == dtype), ink)
        hollow = shown["markerfacecolor"] == "none"
        soft = {"color": ink["soft"], "markeredgecolor": ink["soft" if hollow else "ground"]}
        face = "none" if hollow else ink["soft"]
        entries.append((f"ours, {dtype}", shown | soft | {"markerfacecolor": face}))
    for provider in peers(rows):
        shown = mark(next(row for row in rows if row["provider"] == provider), ink, "peer")
        entries.append((provider, shown | {"alpha": 1.0}))
    entries += [(name, {"color": ink["soft"]} | how) for name, how in (more or {}).items()]
    lines = [Line2D([], [], **how) for _, how in entries]
    figure.legend(
        lines, [name for name, _ in entries],
        loc="outside lower left", ncols=min(len(entries), 9), frameon=False, fontsize=8.5,
        handlelength=1.8, columnspacing=1.6, labelcolor=ink["ink"],
    )  # fmt: skip


def peers(rows: Iterable[Row]) -> list[str]:
    """The peers among providers, in their usual order."""
    found = {row["provider"] for row in rows} - {"ours"}
    return [*(p for p in PROVIDERS if p in found), *sorted(found - set(PROVIDERS))]


def sweeps(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that a line may join: three problems or more that differ in their size alone.

    Their names are alike but for the numbers. Cases of real networks stand for themselves.
    """
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        if not real(row):
            found.setdefault(re.sub(r"\d+[kM]?", "#", row["case"]), []).append(row)
    return [
        members
        for members in found.values()
        if len(members) >= 3 and len({row["sizes"].get("n") for row in members}) == len(members)
    ]


def panels(figure: Any, names: Sequence[str], ink: Ink, columns: int = 3) -> list[Any]:
    """Axes side by side, each with a name."""
    columns = min(len(names), columns)
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False)
    axes = list(grid.flat)
    for one, name in zip(axes, names, strict=False):
        one.set_title(name, loc="left", fontsize=9.5, fontweight="bold", color=ink["ink"])
    for spare in axes[len(names) :]:
        spare.remove()
    return axes[: len(names)]


def rows_of_panels(count: int, columns: int = 3) -> int:
    return -(-count // columns)


def tidy(
    axes: Any, ink: Ink, x: str | None = None, y: str | None = None, grid: str = "both"
) -> None:
    """Quiet axes. ``x``, ``y``: of logarithmic axes how numbers are written, "number" or "si"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, which="major", axis=grid, linewidth=0.7)
    axes.tick_params(length=3, labelsize=8.5)
    axes.tick_params(which="minor", length=0)
    for axis, kind in ((axes.xaxis, x), (axes.yaxis, y)):
        if kind:
            _decades(axis, kind)


def slanted(
    axes: Any, start: tuple[float, float], end: tuple[float, float], text: str, at: float = 0.5
) -> None:
    """Write above a line, so far along its visible part. To be called when all else is drawn."""
    axes.figure.draw_without_rendering()  # fixes the layout, so that angles on the paper are known
    (x0, y0), (x1, y1) = axes.transData.transform([start, end])
    place = axes.transData.inverted().transform([x0 + at * (x1 - x0), y0 + at * (y1 - y0)])
    axes.annotate(
        text, place, (-4, 4), textcoords="offset points", ha="center", va="bottom", size=8.5,
        rotation=degrees(atan2(y1 - y0, x1 - x0)), rotation_mode="anchor",
    )  # fmt: skip


def _decades(axis: Any, kind: str) -> None:
    """Ticks at 1, 10, 100; where few of them are in sight, between them as well."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    span = log10(high / low)
    subs = (1, 2, 5) if span < (2.3 if kind == "number" else 1) else (1, 3) if span < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(_short if kind == "si" else _plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _short(value: float, _: int) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.999 * factor:
            return f"{value / factor:g} {prefix}"
    return f"{value:g}"
