"""The figures beside the roofline: speed-ups, share of the floor, latency, memory, the model.

Each takes rows of one GPU and one kind, and gives a picture or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .ink import Ink, Picture
from .marks import MODE_LINES, legend, mark, panels, peers, rows_of_panels, slanted, sweeps, tidy
from .points import (
    CLOCKS,
    by_op,
    digits,
    label,
    point,
    ratio,
    rivals,
    same,
    seconds,
    si,
    source,
    status,
)
from .rows import Row, slug


def _name(figure: str, rows: Sequence[Row], gpu: str) -> str:
    return f"{'predicted-' if rows[0]['kind'] == 'predicted' else ''}{figure}-{slug(gpu)}"


# --- speed-up over each peer -----------------------------------------------------------------


def speedups(gpu: str, rows: Sequence[Row]) -> Iterator[Picture | str]:
    """A picture per op: how many times as long each peer takes on the device."""
    for op, members in by_op(rows).items():
        yield _speedup(gpu, op, members)


def _speedup(gpu: str, op: str, rows: Sequence[Row]) -> Picture | str:
    pairs = [
        (row, peer, factor)
        for row in rows
        if row["provider"] == "ours"
        for peer in rivals(row, rows)
        if (factor := ratio(peer, row))
    ]
    if not pairs:
        return f"speed-ups, {op}, {gpu}: not drawn, no peer was measured beside ours"
    names = list(dict.fromkeys((row["case"], row["dtype"]) for row, _, _ in pairs))
    count = len(peers(peer for _, peer, _ in pairs))
    return Picture(
        name=f"speed-up-{slug(gpu)}-{slug(op)}",
        title=f"{op}: speed-up over each peer, measured: {gpu}",
        source=f"time on the device, cold L2, peer over ours; {source(rows)}",
        height=1.8 + len(names) * (0.13 + 0.16 * count),
        build=lambda figure, ink: _bars(figure, ink, pairs, names),
    )


def _bars(
    figure: Any, ink: Ink, pairs: Sequence[tuple[Row, Row, float]], names: Sequence[Any]
) -> None:
    from matplotlib.patches import Patch

    modes = list(dict.fromkeys(row["mode"] for row, _, _ in pairs))
    found = peers(peer for _, peer, _ in pairs)
    colour = ink.of(pairs[0][0]["op"], "measured")
    fade = {peer: 1 - 0.75 * i / max(len(found), 2) for i, peer in enumerate(reversed(found))}
    factors = [factor for _, _, factor in pairs]
    grid = figure.subplots(1, len(modes), squeeze=False, sharex=True, sharey=True)[0]
    high = max(factors) ** 1.0 * (max(factors) / min([*factors, 0.9])) ** 0.3
    thick = 0.8 / len(found)
    for axes, mode in zip(grid, modes, strict=True):
        axes.set_title(mode, loc="left", fontsize=9.5, fontweight="bold", color=ink["ink"])
        axes.set(xscale="log", xlim=(min([*factors, 1.0]) / 1.4, max(high, 1.5)))
        for row, peer, factor in (pair for pair in pairs if pair[0]["mode"] == mode):
            at = names.index((row["case"], row["dtype"])) - 0.4
            at += (found.index(peer["provider"]) + 0.5) * thick
            how = {"color": colour, "alpha": fade[peer["provider"]]}
            if factor < 1:
                how = {"facecolor": "none", "edgecolor": ink["alert"], "hatch": "////"}
            (bar,) = axes.barh(at, factor - 1, thick * 0.86, left=1, **how)
            ink.tip(bar, f"{label(row)}: {factor:.3g} times as fast as {peer['provider']}")
            axes.text(
                max(factor, 1) * 1.03, at,
                f"{digits(factor)}x" + (f", slower than {peer['provider']}" if factor < 1 else ""),
                va="center", size=7.5, color=ink["alert" if factor < 1 else "soft"],
                weight="bold" if factor < 1 else "normal",
            )  # fmt: skip
        axes.axvline(1, color=ink["ink"], linewidth=1.2)
        tidy(axes, ink, x="number", grid="x")
        axes.set_xlabel("times as fast as the peer")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    grid[0].set_yticks(range(len(names)), [f"{case} {dtype}" for case, dtype in names])
    grid[0].set_ylim(len(names) - 0.45, -0.55)
    patches = [Patch(color=colour, alpha=fade[peer], label=f"over {peer}") for peer in found]
    if min(factors) < 1:
        patches.append(
            Patch(facecolor="none", edgecolor=ink["alert"], hatch="////", label="ours is slower")
        )
    figure.legend(
        handles=patches, loc="outside lower left", ncols=5, frameon=False, fontsize=8.5,
        labelcolor=ink["ink"],
    )  # fmt: skip


# --- share of the floor ----------------------------------------------------------------------


def shares(gpu: str, rows: Sequence[Row], everything: Sequence[Row]) -> Picture | str:
    """How much of the floor's speed is reached, by the size of the problem."""
    placed = [row for row in rows if point(row)]
    if not placed:
        return f"per cent of the floor, {gpu}: not drawn, its roofs are not known"
    ops = by_op(placed)
    return Picture(
        name=_name("floor", rows, gpu),
        title=f"Per cent of the floor by size, {status(placed, everything)}: {gpu}",
        source=source(placed),
        height=1.3 + 3.5 * rows_of_panels(len(ops)),
        build=lambda figure, ink: _shares(figure, ink, ops),
    )


def _shares(figure: Any, ink: Ink, ops: dict[str, list[Row]]) -> None:
    grid = panels(figure, list(ops), ink)
    for axes, members in zip(grid, ops.values(), strict=True):
        series: dict[tuple[str, ...], list[Row]] = {}
        for row in sorted(members, key=lambda row: (row["provider"] == "ours", row["bytes"])):
            series.setdefault((row["provider"], row["dtype"], row["mode"]), []).append(row)
        for (provider, _, mode), line in series.items():
            dashes = MODE_LINES.get(mode, ":")
            for joined in sweeps(line):
                how = _stroke(joined[0], ink) | {"linestyle": dashes}
                axes.plot([r["bytes"] for r in joined], [_per_cent(r) for r in joined], **how)
            for row in line:
                how = mark(row, ink, "peer") | ({} if provider == "ours" else {"alpha": 0.5})
                (artist,) = axes.plot(row["bytes"], _per_cent(row), **how)
                ink.tip(artist, f"{provider} {label(row)}: {_per_cent(row):.3g} % of the floor")
        axes.axhline(100, color=ink["ink"], linewidth=1.2)
        axes.set(xscale="log", yscale="log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(10, low), max(150, high))
        tidy(axes, ink, x="si", y="number")
        axes.set_xlabel("compulsory bytes")
    grid[0].set_ylabel("per cent of the floor's speed")
    rows = [row for members in ops.values() for row in members]
    modes = {
        mode: {"linestyle": MODE_LINES.get(mode, ":"), "linewidth": 1.3}
        for mode in dict.fromkeys(row["mode"] for row in rows)
    }
    legend(figure, ink, rows, ops=False, more=modes)


def _per_cent(row: Row) -> float:
    placed = point(row)
    assert placed is not None, "rows without one were left out"
    return 100 * placed.share


def _stroke(row: Row, ink: Ink) -> dict[str, Any]:
    """The line through a sweep."""
    ours = row["provider"] == "ours"
    colour = mark(row, ink, "peer")["color"]
    return {"color": colour, "linewidth": 1.4 if ours else 0.7, "alpha": 1 if ours else 0.5}


# --- latency of small problems ---------------------------------------------------------------

_CLOCK_MARKS = {"warm": "<", "device": "o", "eager": "s"}


def latency(gpu: str, rows: Sequence[Row], everything: Sequence[Row]) -> Picture | str:
    """The least problem of each op: what a call takes where size hardly counts."""
    groups: list[list[Row]] = []
    for members in by_op(rows).values():
        least = min(members, key=lambda row: row["bytes"])["case"]
        work: dict[tuple[str, ...], list[Row]] = {}
        for row in members:
            if row["case"] == least:
                work.setdefault(same(row), []).append(row)
        groups += work.values()
    drawn = [row for group in groups for row in group]
    return Picture(
        name=_name("latency", rows, gpu),
        title=f"Latency of the smallest problems, {status(drawn, everything)}: {gpu}",
        source=source(drawn),
        height=1.6 + 0.21 * (len(drawn) + (len(groups) if rows[0]["kind"] == "measured" else 0)),
        build=lambda figure, ink: _latency(figure, ink, groups),
    )


def _latency(figure: Any, ink: Ink, groups: Sequence[Sequence[Row]]) -> None:
    axes = figure.subplots()
    axes.set_xscale("log")
    predicted = groups[0][0]["kind"] == "predicted"
    names: dict[float, str] = {}
    at = 0.0
    for group in groups:
        work = f"{group[0]['op']} {label(group[0])}"
        if not predicted:
            axes.text(
                0.004, at, work, size=8.5, weight="bold", va="center",
                transform=axes.get_yaxis_transform(),
                bbox={"facecolor": ink["ground"], "edgecolor": "none", "pad": 1},
            )  # fmt: skip
            at += 1
        for row in group:
            names[at] = work if predicted else row["provider"]
            _clocks(axes, ink, row, at)
            at += 1
        at += 0.15
    launch = next(
        (us for g in groups for row in g if (us := (row.get("roofs") or {}).get("launch_us"))), None
    )
    dots = {"color": ink["soft"], "linewidth": 0.9, "linestyle": (0, (1, 2))}
    if launch and not predicted:
        axes.axvline(launch, **dots)
    axes.set_yticks(list(names), list(names.values()))
    axes.set_ylim(at - 0.4, -0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * (2.5 if predicted else 1.3))
    axes.set_xlabel("microseconds a call" + (", predicted" if predicted else ""))
    axes.spines["left"].set_visible(False)
    tidy(axes, ink, x="number", grid="x")
    axes.tick_params(axis="y", length=0)
    if predicted:
        return
    more: dict[str, dict[str, Any]] = {
        CLOCKS[clock]: {"marker": marker, "linestyle": "none"}
        for clock, marker in _CLOCK_MARKS.items()
    }
    if launch:
        more[f"one launch, {digits(launch)} us"] = dots
    legend(figure, ink, [], more=more)


def _clocks(axes: Any, ink: Ink, row: Row, at: float) -> None:
    """One row's times, joined; the number is the largest."""
    shown = mark(row, ink, "peer")
    predicted = row["kind"] == "predicted"
    times = {c: t * 1e6 for c in _CLOCK_MARKS if (t := seconds(row, c))}
    longest = max(times.values())
    axes.plot([min(times.values()), longest], [at, at], color=shown["color"], linewidth=1)
    limit = f"limited by {row.get('limit')}"
    for clock, time in times.items():
        how = {"marker": _CLOCK_MARKS[clock], "markersize": 6, "color": shown["color"]}
        (artist,) = axes.plot([time], [at], **(shown if predicted else how))
        said = limit if predicted else CLOCKS[clock]
        ink.tip(artist, f"{row['op']} {label(row)}, {row['provider']}: {digits(time)} us, {said}")
    axes.annotate(
        digits(longest) + (f", {limit}" if predicted else ""), (longest, at), (7, 0),
        textcoords="offset points", va="center", size=8,
        color=ink["ink" if row["provider"] == "ours" else "soft"],
    )  # fmt: skip


# --- memory ----------------------------------------------------------------------------------


def memory(gpu: str, rows: Sequence[Row], everything: Sequence[Row]) -> Picture | str:
    """What a call holds beside its inputs, for ops that have cases of three sizes or more."""
    swept: dict[str, list[Row]] = {}
    for op, members in by_op(row for row in rows if row.get("peak_memory")).items():
        last = max(members, key=lambda row: (len(row["mode"]), row["dtype"]))
        chosen = [r for r in members if (r["mode"], r["dtype"]) == (last["mode"], last["dtype"])]
        if len({row["sizes"].get("n") for row in chosen}) >= 3:
            swept[op] = chosen
    if not swept:
        return f"memory, {gpu}: not drawn, no op has its peak memory at three sizes"
    drawn = [row for members in swept.values() for row in members]
    return Picture(
        name=_name("memory", rows, gpu),
        title=f"Memory against N, {status(drawn, everything)}: {gpu}",
        source=f"most that a call holds beside its inputs; {source(drawn)}",
        height=1.3 + 3.5 * rows_of_panels(len(swept)),
        build=lambda figure, ink: _memory(figure, ink, swept),
    )


def _memory(figure: Any, ink: Ink, swept: dict[str, list[Row]]) -> None:
    names = [f"{op}, {rows[0]['mode']}, {rows[0]['dtype']}" for op, rows in swept.items()]
    grid = panels(figure, names, ink)
    for axes, members in zip(grid, swept.values(), strict=True):
        for provider in [*peers(members), "ours"]:
            line = [row for row in members if row["provider"] == provider]
            for joined in sweeps(line):
                sizes = [row["sizes"]["n"] for row in joined]
                axes.plot(sizes, [row["peak_memory"] for row in joined], **_stroke(joined[0], ink))
            for row in line:
                n, held = row["sizes"]["n"], row["peak_memory"]
                (artist,) = axes.plot(n, held, **mark(row, ink, "peer"))
                ink.tip(artist, f"{provider} {label(row)}: {si(held, 'B')}")
        axes.set(xscale="log", yscale="log")
        tidy(axes, ink, x="si", y="si")
        axes.set_xlabel("N")
    grid[0].set_ylabel("bytes")
    legend(figure, ink, [row for members in swept.values() for row in members])
    if "nms" in swept:
        _bitmask(grid[list(swept).index("nms")], ink)


def _bitmask(axes: Any, ink: Ink) -> None:
    """What a bit for each pair of boxes takes."""
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.plot([low, high], [low**2 / 8, high**2 / 8], color=ink["ink"], linewidth=1, zorder=1.5)
    axes.set(xlim=(low, high), ylim=(bottom, max(top, high**2 / 8)))
    start = max(low, (8 * bottom) ** 0.5)
    slanted(
        axes, (start, start**2 / 8), (high, high**2 / 8), "bitmask of all pairs, N\u00b2/8", 0.7
    )


# --- the model judged ------------------------------------------------------------------------


def matched(predicted: Sequence[Row], measured: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Predictions, each with the measurement of the same work on the same GPU."""
    known = {same(r): r for r in measured if r["provider"] == "ours" and seconds(r)}
    return [(row, known[same(row)]) for row in predicted if same(row) in known and seconds(row)]


def against(gpu: str, predicted: Sequence[Row], measured: Sequence[Row]) -> Picture | str:
    pairs = matched(predicted, measured)
    if not pairs:
        return f"predicted against measured, {gpu}: not drawn, no case was both on this GPU"
    return Picture(
        name=f"predicted-against-measured-{slug(gpu)}",
        title=f"Predicted against measured: {gpu}",
        source=f"predicted: {source([p for p, _ in pairs])}\nmeasured: "
        f"{source([m for _, m in pairs])}",
        height=6.4,
        build=lambda figure, ink: _against(figure, ink, pairs),
    )


def _against(figure: Any, ink: Ink, pairs: Sequence[tuple[Row, Row]]) -> None:
    axes = figure.subplots()
    both = [t * 1e6 for pair in pairs for row in pair if (t := seconds(row))]
    low, high = min(both) / 2, max(both) * 2
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ends = [low, high]
    axes.fill_between(ends, [low / 2, high / 2], [low * 2, high * 2], color=ink["line"], alpha=0.6)
    axes.plot(ends, ends, color=ink["ink"], linewidth=1.2)
    for row, truth in pairs:
        x, y = (seconds(row) or 0) * 1e6, (seconds(truth) or 0) * 1e6
        (artist,) = axes.plot(x, y, **mark(row, ink))
        ink.tip(
            artist,
            f"{row['op']} {label(row)}: predicted {digits(x)} us, limited by {row.get('limit')}; "
            f"measured {digits(y)} us, {y / x:.2f} times that",
        )
    axes.set_xlabel("microseconds, predicted")
    axes.set_ylabel("microseconds, measured (device, cold L2)")
    tidy(axes, ink, x="number", y="number")
    band = {"color": ink["line"], "linewidth": 7}
    more: dict[str, dict[str, Any]] = {
        "as predicted": {"color": ink["ink"]},
        "within a factor of 2": band,
    }
    legend(figure, ink, [row for row, _ in pairs], more=more)
