"""``python -m dlops_triton.perf run`` and ``plot``: measure, or say what is known without a GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import OPS, machine, roofline, rows, static, timing
from .bench import DTYPES, Bench, Case, load
from .rows import Row

Job = tuple[Bench, Case, str, str]  # dtype, mode


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dlops_triton.perf", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="time the ops and their peers, where there is a GPU")
    run.set_defaults(command=_run)
    run.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default: all")
    run.add_argument("--dtype", action="append", choices=DTYPES, help="only these; may be repeated")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after so long")
    run.add_argument(
        "--out", type=Path, help="append the rows here, not to perf/results or perf/out"
    )
    run.add_argument("--commit", help="what to record as the commit, in a copy without git")
    run.add_argument(
        "--target", default="sm_90", help="without a GPU: the one to compile for (default: sm_90)"
    )

    plot = commands.add_parser("plot", help="draw rooflines from result files")
    plot.set_defaults(command=_plot)
    plot.add_argument(
        "files", nargs="*", type=Path, help="default: perf/results/*.jsonl, else perf/out/*.jsonl"
    )
    plot.add_argument("--out", type=Path, default=rows.OUT, help="folder (default: perf/out)")
    plot.add_argument("--format", default="png", choices=("png", "svg"))
    return parser


def _run(options: argparse.Namespace) -> int:
    unknown = set(options.ops) - set(OPS)
    if unknown:
        print(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
        return 2
    benches = [load(op) for op in options.ops or OPS]
    dtypes = tuple(options.dtype or DTYPES)
    if torch.cuda.is_available():
        return _time(benches, dtypes, options)
    return static.run(benches, dtypes, options.target, options.out, options.commit)


def jobs(benches: Sequence[Bench], dtypes: Sequence[str]) -> list[Job]:
    """What there is to measure, the cases of real networks of all ops first."""
    return [
        (bench, case, dtype, mode)
        for kind in ("cases", "sweep")
        for bench in benches
        for case in getattr(bench, kind)
        for dtype in case.dtypes
        if dtype in dtypes
        for mode in case.modes
    ]


def _time(benches: Sequence[Bench], dtypes: Sequence[str], options: argparse.Namespace) -> int:
    device = torch.device("cuda")
    common = machine.gpu(device) | rows.provenance(options.commit) | machine.roofs(device)
    file = options.out or rows.RESULTS / f"{rows.slug(common['gpu'])}.jsonl"
    print(
        f"{common['gpu']}: copies {common['roof_copy_bytes_per_s'] / 1e12:.2f} TB/s, multiplies "
        f"{common['roof_matmul_bf16_flop_per_s'] / 1e12:.0f} TFLOP/s in bf16 and "
        f"{common['roof_matmul_fp32_flop_per_s'] / 1e12:.0f} in fp32. Rows go to {file}"
    )
    timing.count_launches(lambda: None, device)  # the profiler's traces slow all cases, or none
    todo = jobs(benches, dtypes)
    start = time.monotonic()
    done: list[Row] = []
    try:
        with tqdm(todo, unit="case") as bar:
            for number, job in enumerate(bar):
                if options.budget is not None and time.monotonic() - start > options.budget:
                    bar.write(f"The budget is spent: {len(todo) - number} cases were not measured.")
                    break
                found = [row | common for row in measured(job, device, bar)]
                rows.append(file, found)
                done += found
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was measured is in {file}")
    print(table(done))
    return 0


def measured(job: Job, device: torch.device, bar: Any) -> list[Row]:
    """The rows of one job, told to a progress bar as they come."""
    bench, case, dtype, mode = job
    name = f"{bench.name} {case.name} {dtype} {mode}"

    def say(provider: str, what: str) -> None:
        bar.set_description(f"{name}: {what} {provider}")
        if what.startswith("left out"):
            bar.write(f"{name}: {provider} {what}")

    try:
        found = timing.measure(bench, case, dtype, mode, device, say)
    except torch.OutOfMemoryError:
        bar.write(f"{name}: left out, the GPU has too little memory")
        return []
    key = {
        "kind": "measured",
        "op": bench.name,
        "case": case.name,
        "sizes": dict(case.sizes),
        "mode": mode,
        "dtype": dtype,
        "bytes": bench.bytes(case, mode, DTYPES[dtype].itemsize),
        "operations": bench.operations(case, mode),
    }
    for row in found:
        bar.set_postfix_str(f"last: {row['provider']} {row['device_p50_us'] or 0:.1f} us")
    return [key | row for row in found]


def table(found: Sequence[Row]) -> str:
    """Measured rows, a line each; "of roof" is the least time that the roofs allow over the p50."""
    lines = [
        f"{'op case dtype mode':52} {'provider':12} {'device us':>10} {'eager us':>10} "
        f"{'of roof':>7} {'launches':>8} {'MB extra':>9} {'error':>8}"
    ]
    for row in found:
        name = f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"
        point = roofline.point(row)
        assert point is not None, "it was measured"
        lines.append(
            f"{name:52} {row['provider']:12} {row['device_p50_us']:10.1f} "
            f"{row['eager_p50_us']:10.1f} {point.share:7.0%} {row['launches'] or '?':>8} "
            f"{(row['peak_memory'] or 0) / 1e6:9.1f} {row['error']:8.0e}"
        )
    return "\n".join(lines)


def _plot(options: argparse.Namespace) -> int:
    files = (
        options.files or sorted(rows.RESULTS.glob("*.jsonl")) or sorted(rows.OUT.glob("*.jsonl"))
    )
    if not files:
        print(f"no result files in {rows.RESULTS} or {rows.OUT}: `run` makes one")
        return 2
    for picture in roofline.draw(rows.read(files), options.out, options.format):
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
