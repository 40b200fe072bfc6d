"""Pictures, drawn from result rows alone, and the first of them: the roofline of a GPU.

Rows that were measured and rows that were predicted never meet in a picture, but for the one that
judges the predictions. Where rows do not suffice for a picture there is a reason in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .ink import Ink, Picture, png, svg
from .marks import legend, mark, slanted, tidy
from .points import Point, of_kind, point, seconds, si, source, status
from .rows import Row, slug


def draw(
    rows: Sequence[Row], folder: Path, extension: str = "svg", theme: str = "light"
) -> Iterator[str]:
    """Draw all that the rows allow, and yield the files, or why there is none.

    Args:
        extension: "svg", which follows the reader's light or dark ground, or "png".
        theme: the ground of a PNG, "light" or "dark".
    """
    if extension not in ("svg", "png"):
        raise ValueError(f"pictures are svg or png, not {extension}")
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures(rows):
        if isinstance(picture, str):
            yield picture
            continue
        file = folder / f"{picture.name}.{extension}"
        drawn = svg(picture).encode() if extension == "svg" else png(picture, theme)
        file.write_bytes(drawn)
        yield str(file)


def pictures(rows: Sequence[Row]) -> Iterator[Picture | str]:
    """All figures, measured ones first, by GPU; a string says why one is missing."""
    measured, predicted = of_kind(rows, "measured"), of_kind(rows, "predicted")
    for gpu, members in measured.items():
        yield from of_gpu(gpu, [row for row in members if seconds(row)], rows)
    for gpu, members in predicted.items():
        yield from of_gpu(gpu, [row for row in members if seconds(row)], rows)
        if gpu not in measured:
            yield f"speed-ups, {gpu}: not drawn, speed-ups are only ever measured"
    for gpu in dict.fromkeys([*measured, *predicted]):
        yield plots.against(gpu, predicted.get(gpu, []), measured.get(gpu, []))


def of_gpu(gpu: str, rows: Sequence[Row], everything: Sequence[Row]) -> Iterator[Picture | str]:
    """The figures of one GPU's rows of one kind, all of which have a time."""
    if not rows:
        yield f"{gpu}: nothing drawn, no row has a time on the device"
        return
    yield _roofline(gpu, rows, everything)
    if rows[0]["kind"] == "measured":
        yield from plots.speedups(gpu, rows)
    yield plots.shares(gpu, rows, everything)
    yield plots.latency(gpu, rows, everything)
    yield plots.memory(gpu, rows, everything)


def _roofline(gpu: str, rows: Sequence[Row], everything: Sequence[Row]) -> Picture | str:
    """Operations per second over operations per byte, under what the GPU can copy and execute."""
    placed = [(row, p) for row in rows if (p := point(row))]
    kind = rows[0]["kind"]
    if not placed:
        return f"roofline, {gpu}, {kind}: not drawn, its roofs are not known"
    drawn = [row for row, _ in placed]
    return Picture(
        name=f"{'predicted-' if kind == 'predicted' else ''}roofline-{slug(gpu)}",
        title=f"Roofline, {status(drawn, everything)}: {gpu}",
        source=source(drawn),
        height=6.4,
        build=lambda figure, ink: _fill(figure, ink, placed),
    )


def _fill(figure: Any, ink: Ink, placed: Sequence[tuple[Row, Point]]) -> None:
    axes = figure.subplots()
    points = [p for _, p in placed]
    newest = max(placed, key=lambda pair: str(pair[0]["date"]))[1]
    copy, peak = newest.copy, newest.peak
    ridge = peak / copy
    low = min(ridge / 4, *(p.intensity for p in points)) / 2
    high = max(ridge, *(p.intensity for p in points)) * 2
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min(low * copy, *(p.rate for p in points)) / 2, peak * 4)
    axes.plot([low, ridge, high], [low * copy, peak, peak], color=ink["ink"], linewidth=1.3)
    # Peers first, so that they lie below.
    for row, p in sorted(placed, key=lambda pair: pair[1].provider == "ours"):
        (artist,) = axes.plot(p.intensity, p.rate, **mark(row, ink))
        ink.tip(
            artist,
            f"{row['op']} {p.label}, {p.provider}: {p.seconds * 1e6:,.1f} us, "
            f"{p.share:.0%} of the floor",
        )
    axes.set_xlabel("operations per compulsory byte")
    axes.set_ylabel("operations per second")
    tidy(axes, ink, x="number", y="si")
    legend(figure, ink, [row for row, _ in placed])
    slanted(axes, (low, low * copy), (ridge, peak), f"DRAM copy {si(copy, 'B/s')}")
    slanted(axes, (ridge, peak), (high, peak), f"{si(peak)} instructions/s")
