"""The report, from result rows alone: one HTML page, and the table of the README in Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from . import marks, page, roofline, sections
from .causes import losses, ours_measured
from .ink import Picture, svg
from .page import pill
from .points import digits, of_kind, point, ratio, real, rivals, same, seconds, source, status
from .rows import RESULTS, Row, slug

NOTES = RESULTS / "notes.json"
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"

_READING = """\
<dl>
<dt>Floor</dt>
<dd>The least time in which a case's compulsory bytes (each input read once, each output written
once) can be copied and its operations be executed, whichever is longer. Bytes and operations are
the same for every provider; the roofs are measured in the same run, or for a prediction taken from
the datasheet. "Of floor" is the floor over the time: only data that stay in a cache can pass 100 %.
</dd>
<dt>Device, cold L2</dt>
<dd>A call's time on the GPU, without launches where it can be captured in a CUDA graph, on inputs
that are not in the cache. This is the time that speed-ups are made of.</dd>
<dt>Device, warm L2</dt>
<dd>The same, on inputs that were just used.</dd>
<dt>Eager, wall clock</dt>
<dd>What the caller waits for: the host's work, launches and the device's work.</dd>
<dt>Speed-up</dt>
<dd>The peer's time over ours. Below 1 ours is slower.</dd>
<dt>Predicted</dt>
<dd>No GPU was involved: machine code as compiled, traffic as counted in Triton's interpreter, rates
of the datasheet. No latency of memory is in it. Predictions are never drawn into a picture of
measurements, but for the one that compares the two.</dd>
</dl>
<p>What is fair about the comparison and what is not: perf/README.md.</p>"""


def write(rows: Sequence[Row], folder: Path, notes: Path = NOTES) -> list[Path]:
    """Write ``report.html`` and ``report.md``.

    Args:
        notes: optional JSON, causes written by hand: {"op/case/mode/dtype": "why"}.
    """
    said = json.loads(notes.read_text()) if notes.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "report.html", folder / "report.md"]
    files[0].write_text(html(rows, said), encoding="utf-8")
    files[1].write_text(markdown(rows), encoding="utf-8")
    return files


def html(rows: Sequence[Row], notes: Mapping[str, str] | None = None) -> str:
    """The page: what speaks against ours first, then the rest."""
    measured, predicted = of_kind(rows, "measured"), of_kind(rows, "predicted")
    parts: list[tuple[str, str]] = [("Slower than a peer", sections.slower(rows, notes or {}))]
    for gpu, members in measured.items():
        parts += [
            (f"Summary: {gpu}", sections.summary(members, rows)),
            (f"Roofs: {gpu}", sections.roofs(gpu, rows)),
            (f"Figures: {gpu}", sections.drawn(gpu, "measured", rows)),
            (f"All measurements: {gpu}", sections.everything(gpu, rows)),
        ]
    for gpu in of_kind(rows, "probe"):
        if gpu not in measured:
            parts.append((f"Roofs: {gpu}", sections.roofs(gpu, rows)))
    for number, gpu in enumerate(predicted):
        body = sections.drawn(gpu, "predicted", rows) + sections.predictions(gpu, rows)
        opened = " open" if number == 0 and not measured else ""
        words = f"{len(predicted[gpu])} cases {pill(status(predicted[gpu], rows))}"
        body = f"<details{opened}><summary>{words}</summary>\n{body}\n</details>"
        parts.append((f"Predictions: {gpu}", body))
    parts += [
        (f"Predicted against measured: {gpu}", sections.judged(gpu, rows)) for gpu in predicted
    ]
    parts.append(("How to read this", _READING))
    shown = [(name, body) for name, body in parts if body]
    links = "".join(f'<li><a href="#{slug(name)}">{escape(name)}</a></li>' for name, _ in shown)
    body = "\n".join(
        f'<section>\n<h2 id="{slug(name)}">{escape(name)}</h2>\n{text}\n</section>'
        for name, text in shown
    )
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    return page.document("dlops_triton: performance", f"{_opening(rows)}\n{nav}\n{body}")


def _opening(rows: Sequence[Row]) -> str:
    measured, predicted = of_kind(rows, "measured"), of_kind(rows, "predicted")
    lines = ["<h1>dlops_triton: how fast its ops are, and how fast they could be</h1>"]
    if not measured:
        lines.append(
            "<p><strong>No speed has been measured yet.</strong> All times below are "
            f"{pill('predicted, not yet measured')}</p>"
        )
    lines.append("<ul>")
    for gpu, members in (*measured.items(), *predicted.items()):
        lines.append(
            f"<li>{escape(gpu)} {pill(status(members, rows))} "
            f'<span class="source">{len(members)} rows; {escape(source(members))}; '
            f"{sections.commands(members)}</span></li>"
        )
    lines.append("</ul>")
    return "\n".join(lines)


# --- Markdown --------------------------------------------------------------------------------


def update_readme(file: Path, rows: Sequence[Row], folder: Path = RESULTS) -> list[Path]:
    """Put the table and the roofline between the markers of a Markdown file.

    Args:
        folder: for the picture, which the file then shows.

    Returns:
        The files that were written.

    Raises:
        ValueError: the file lacks one of the markers, or has them the wrong way round.
    """
    text = file.read_text(encoding="utf-8")
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"{file} must have a line {BEGIN} and after it a line {END}")
    block, written = markdown(rows), [file]
    # Of the measured GPUs, or else of the predicted, the first.
    picture = next(roofline.pictures(rows), None)
    if isinstance(picture, Picture):
        drawn = folder / f"{picture.name}.svg"
        drawn.parent.mkdir(parents=True, exist_ok=True)
        drawn.write_text(svg(picture), encoding="utf-8")
        written.append(drawn)
        place = Path(os.path.relpath(drawn, file.parent)).as_posix()
        block += f"\n![{_plain(picture.title)}]({place})\n"
    new = f"{text[: start + len(BEGIN)]}\n{block}{text[end:]}"
    file.write_text(new, encoding="utf-8")
    return written


def markdown(rows: Sequence[Row]) -> str:
    """The cases of real networks: measured, or where nothing is measured, predicted."""
    measured = of_kind(ours_measured(rows), "measured")
    if measured:
        blocks = [_measured(gpu, members, rows) for gpu, members in measured.items()]
    else:
        predicted = {gpu: _chosen(members) for gpu, members in of_kind(rows, "predicted").items()}
        blocks = [_predicted(predicted)] if any(predicted.values()) else ["Nothing is measured."]
    return "\n\n".join(blocks) + "\n"


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """Of each real network's case and dtype the longest mode."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row["op"], row["case"], row["dtype"])
        if real(row) and seconds(row) and len(row["mode"]) >= len(last.get(key, row)["mode"]):
            last[key] = row
    return list(last.values())


def _measured(gpu: str, members: Sequence[Row], rows: Sequence[Row]) -> str:
    peers = marks.peers(row for row in rows if row["kind"] == "measured" and row["gpu"] == gpu)
    lines = []
    for row in _chosen(members):
        found = {peer["provider"]: ratio(peer, row) for peer in rivals(row, rows)}
        placed = point(row)
        share = f"{placed.share:.0%}" if placed else ""
        factors = [_factor(found[name]) if name in found else "left out" for name in peers]
        lines.append([*_work(row), _us(row), share, *factors])
    lost = [loss for loss in losses(rows) if loss.row["gpu"] == gpu]
    said = (
        f"Comparisons lost by one clock at least, sweeps included: {len(lost)}; the report has "
        "them first, with their causes."
        if lost
        else "No comparison is lost by any clock, sweeps included."
    )
    head = (
        f'**{_plain(gpu)}, measured.** {said} Time on the device with a cold L2; "over" a peer: '
        f"its time over ours. {_from(members)}"
    )
    names = ["op", "case", "dtype", "mode", "us", "of floor", *(f"over {_plain(p)}" for p in peers)]
    return f"{head}\n\n{_table(names, lines)}"


def _predicted(predicted: Mapping[str, Sequence[Row]]) -> str:
    """A column for each GPU."""
    times = {same(row): _us(row) for members in predicted.values() for row in members}
    works = {same(row)[1:]: row for members in predicted.values() for row in members}
    lines = [
        [*_work(row), *(times.get((gpu, *work), "") for gpu in predicted)]
        for work, row in works.items()
    ]
    members = [row for rows in predicted.values() for row in rows]
    head = (
        "**Predicted, not yet measured.** Microseconds of a call, from machine code as compiled, "
        "traffic as counted in Triton's interpreter and the rates of the datasheets. "
        f"{_from(members)}"
    )
    return f"{head}\n\n{_table(['op', 'case', 'dtype', 'mode', *map(_plain, predicted)], lines)}"


def _from(members: Sequence[Row]) -> str:
    commands = list(dict.fromkeys(" ".join(str(row["command"]).split()) for row in members))
    said = ", ".join(f"`{command.replace('`', chr(39))}`" for command in commands[:3])
    where = _plain(source(members))
    return f"{where[0].upper()}{where[1:]}; {said}."


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * 4 + ["---:"] * (len(names) - 4)  # the first four say which work it is
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *lines))


def _work(row: Row) -> list[str]:
    return [_plain(row[name]) for name in ("op", "case", "dtype", "mode")]


def _us(row: Row) -> str:
    return digits(1e6 * (seconds(row) or 0))


def _factor(factor: float | None) -> str:
    if factor is None:
        return ""
    return f"{digits(factor)}x" if factor >= 1 else f"**{digits(factor)}x, slower**"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return escape(" ".join(str(text).split()), quote=False).translate(
        {ord(mark): f"\\{mark}" for mark in "|*_`[]"}
    )
