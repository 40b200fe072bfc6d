"""Pictures, drawn from result rows alone: a roofline per op and machine, and the share of the roof.

The roof over a case is the least time in which its bytes can be copied and its operations be
executed. Rows measured on a GPU have the rates that were measured in the same run. Static rows are
put under the rates of a GPU of their target, known from elsewhere, at the least time that the
counted instructions and sectors allow: a prediction, never drawn into a picture of measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import Row, slug

# Rates for predictions. Copy: measured with torch on an H200, 2026-10-28, reading and writing
# counted; fp32: NVIDIA's datasheet.
KNOWN: dict[str, Row] = {
    "sm_90": {
        "gpu": "NVIDIA H200",
        "roof_copy_bytes_per_s": 4.3e12,
        "roof_matmul_fp32_flop_per_s": 67e12,
    }
}
_STYLES = {
    "ours": ("tab:red", "o"),
    "eager": ("tab:gray", "v"),
    "compile": ("tab:blue", "s"),
    "torchvision": ("tab:green", "D"),
}


@dataclass
class Point:
    """One row under its roof. Rates are bytes and operations per second."""

    label: str
    provider: str
    bytes: float
    operations: float
    seconds: float
    copy: float
    peak: float
    predicted: bool

    @property
    def intensity(self) -> float:
        return self.operations / self.bytes

    @property
    def share(self) -> float:
        """Of the speed that the roof allows."""
        return max(self.bytes / self.copy, self.operations / self.peak) / self.seconds


def point(row: Row) -> Point | None:
    """A row's place in the picture; None where no time is measured and none can be predicted."""
    known: Row | None = row if row["kind"] == "measured" else KNOWN.get(row["target"])
    if known is None:
        return None
    copy = known["roof_copy_bytes_per_s"]
    # A product takes two of the matrix product's operations but one instruction.
    peak = known["roof_matmul_fp32_flop_per_s"] / 2
    if row["kind"] == "measured":
        seconds = row["device_p50_us"] / 1e6
    elif row["instructions"] is None:
        return None
    else:
        moved = row["bytes"] * row["sector_bytes"] / row["small_bytes"]
        seconds = max(moved / copy, row["instructions"] / peak)
    return Point(
        label=f"{row['case']} {row['dtype']} {row['mode']}",
        provider=row["provider"],
        bytes=row["bytes"],
        operations=row["operations"],
        seconds=seconds,
        copy=copy,
        peak=peak,
        predicted=row["kind"] != "measured",
    )


def draw(found: Sequence[Row], folder: Path, extension: str = "png") -> Iterator[str]:
    """Draw every group of rows that belong together, and yield the files, or why there is none."""
    import matplotlib as mpl

    mpl.use("Agg")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        machine = row["gpu"] if row["kind"] == "measured" else row["target"]
        groups.setdefault((row["kind"], machine, row["op"]), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for (kind, machine, op), members in groups.items():
        points = [p for p in map(point, members) if p is not None]
        if not points:
            yield f"{op}, {kind}, {machine}: not drawn, no time is measured and none predicted"
            continue
        file = folder / f"{'roofline' if kind == 'measured' else 'predicted'}-{slug(machine)}-{op}"
        file = file.with_name(f"{file.name}.{extension}")
        _picture(points, *_titles(op, members), file)
        yield str(file)


def _titles(op: str, members: Sequence[Row]) -> tuple[str, str]:
    newest = max(members, key=lambda row: row["date"])
    commits = sorted({str(row["commit"]) for row in members})
    versions = f"torch {newest['torch']}, Triton {newest['triton']}"
    source = f"commit {', '.join(commits)}, {newest['date'][:10]}, {versions}"
    if newest["kind"] == "measured":
        return f"{op} on {newest['gpu']}, measured", f"driver {newest['driver']}, {source}"
    gpu = KNOWN[newest["target"]]["gpu"]
    return (
        f"{op}: PREDICTED for {gpu}, not measured",
        f"without a GPU: instructions as compiled for {newest['target']}, bytes as counted on a "
        f"small problem, no latency, no launch\n{source}",
    )


def _picture(points: Sequence[Point], title: str, subtitle: str, file: Path) -> None:
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(p.label for p in points))
    height = max(5.0, 2.2 + 0.26 * len(labels))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, height), width_ratios=(1, 1), layout="constrained"
    )
    figure.suptitle(title, fontweight="bold")
    left.set_title(subtitle, loc="left", fontsize=8)
    _roofline(left, points, labels)
    _shares(right, points, labels)
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _roofline(axes: Any, points: Sequence[Point], labels: Sequence[str]) -> None:
    """Operations per second over operations per byte; each case has its number."""
    copy, peak = points[-1].copy, points[-1].peak
    ridge = peak / copy
    low = min(ridge, *(p.intensity for p in points)) / 2
    high = max(ridge, *(p.intensity for p in points)) * 2
    slowest = min(p.operations / p.seconds for p in points)
    axes.plot([low, ridge, high], [low * copy, peak, peak], color="black", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min(slowest, low * copy) / 2, peak * 4)
    axes.set_xlabel("operations per compulsory byte")
    axes.set_ylabel("operations per second")
    roof = f"roof: copy {copy / 1e12:.2f} TB/s, fp32 {peak / 1e12:.1f} T instructions/s"
    axes.text(0.02, 0.96, roof, transform=axes.transAxes, va="top", fontsize=9)
    for p in points:
        axes.plot(p.intensity, p.operations / p.seconds, markersize=5, alpha=0.8, **_style(p))
    axes.grid(True, which="major", alpha=0.3)
    _plain_ticks(axes.xaxis)
    axes.figure.canvas.draw()  # fixes the layout, so that distances on the screen are known
    placed: list[tuple[float, float]] = []
    for p in points:
        if p.provider == "ours":
            _number(axes, p, str(labels.index(p.label) + 1), placed)


def _style(p: Point) -> dict[str, Any]:
    color, marker = _STYLES.get(p.provider, ("tab:purple", "P"))
    face = "none" if p.predicted else color
    return {"color": color, "marker": marker, "linestyle": "none", "markerfacecolor": face}


def _plain_ticks(axis: Any) -> None:
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _number(axes: Any, p: Point, text: str, placed: list[tuple[float, float]]) -> None:
    """Write a case's number beside its point, at the first place that is free."""
    x, y = axes.transData.transform((p.intensity, p.operations / p.seconds))
    for step in range(1, 9):
        for dx, dy in ((11, 0), (-11, 0), (11, 9), (-11, 9), (11, -9), (-11, -9)):
            at = (x + dx * step, y + dy)
            if all(abs(at[0] - a) > 14 or abs(at[1] - b) > 10 for a, b in placed):
                placed.append(at)
                axes.annotate(
                    text, (p.intensity, p.operations / p.seconds), (dx * step, dy),
                    textcoords="offset pixels", fontsize=7, ha="center", va="center",
                )  # fmt: skip
                return


def _shares(axes: Any, points: Sequence[Point], labels: Sequence[str]) -> None:
    """A line per case: how much of the roof's speed each provider reaches."""
    lines = {label: i for i, label in enumerate(labels)}
    for provider in dict.fromkeys(p.provider for p in points):
        mine = [p for p in points if p.provider == provider]
        axes.plot(
            [100 * p.share for p in mine],
            [lines[p.label] for p in mine],
            markersize=6,
            label=f"{provider}, predicted" if mine[0].predicted else provider,
            **_style(mine[0]),
        )
    lowest = 100 * min(p.share for p in points)
    axes.set(xscale="log", xlim=(min(1.0, lowest / 2), 800), ylim=(len(labels) - 0.4, -0.6))
    for p in points:
        if p.provider == "ours":
            axes.text(
                760,
                lines[p.label],
                f"{p.seconds * 1e6:,.1f} us",
                fontsize=8,
                ha="right",
                va="center",
            )
    axes.axvline(100, color="black", linewidth=1.2)
    axes.set_yticks(range(len(labels)), [f"{label}  {i + 1}" for label, i in lines.items()])
    axes.tick_params(axis="y", labelsize=8)
    what = "the predicted time" if points[0].predicted else "the time of ours"
    axes.set_xlabel(f"per cent of the speed that the roof allows; at the right, {what}")
    axes.grid(True, axis="x", which="major", alpha=0.3)
    axes.grid(True, axis="y", alpha=0.2)
    _plain_ticks(axes.xaxis)
