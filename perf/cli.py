"""Measure the ops, their peers and the GPU itself, or say what is known without one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import OPS, candidates, compare, machine, report, roofline, rows, static, tune
from . import run as run_
from .bench import DTYPES, SETS, Bench, jobs, load
from .gpus import GPUS

_NO_GPU = "No GPU found."


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    unknown = set(getattr(options, "ops", ())) - set(OPS)
    if unknown:
        print(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
        return 2
    missing = [str(file) for file in getattr(options, "files", ()) if not file.is_file()]
    if missing:
        print(f"no such file: {', '.join(missing)}")
        return 2
    try:
        status: int = options.command(options)
    except KeyboardInterrupt:
        print("\nInterrupted.")
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dlops_triton.perf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="time the ops and their peers; without a GPU: predict")
    run.set_defaults(command=_run)
    _add_ops(run)
    run.add_argument(
        "--cases", default="real", choices=SETS, help="those of real networks (default), the small "
        "ones that launches decide, or all, with the sweeps",
    )  # fmt: skip
    run.add_argument("--dtype", action="append", choices=DTYPES, help="only these; may be repeated")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="end after so long")
    run.add_argument(
        "--resume", action="store_true", help="leave out what the file has, by this commit"
    )
    run.add_argument(
        "--base", metavar="GITREF", help="compare with another commit, taking turns on the GPU"
    )
    _add_out(run, "append the rows here, not to perf/results (without a GPU: perf/out)")
    run.add_argument("--gpu", action="append", choices=(*GPUS, "all"), help=_GPU_HELP)

    plot = commands.add_parser("plot", help="draw the pictures from result files")
    plot.set_defaults(command=_plot)
    _add_files(plot)
    plot.add_argument("--format", default="svg", choices=("svg", "png"))
    plot.add_argument("--theme", default="light", choices=("light", "dark"), help="of a PNG")

    report_ = commands.add_parser("report", help="write report.html and report.md")
    report_.set_defaults(command=_report)
    _add_files(report_)
    report_.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="also put table and picture into this Markdown file",
    )

    tune_ = commands.add_parser("tune", help="search the launch settings for the GPU at hand")
    tune_.set_defaults(command=_tune)
    _add_ops(tune_)
    tune_.add_argument("--budget", type=float, default=600.0, metavar="SECONDS")
    tune_.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for table and evidence, which the library "
        "then does not read (default: dlops_triton/tuned and perf/results)",
    )  # fmt: skip
    tune_.add_argument("--commit", help=_COMMIT_HELP)
    tune_.add_argument("--gpu", action="append", choices=(*GPUS, "all"), help=_GPU_HELP)

    probe = commands.add_parser("probe", help="measure the roofs of the GPU at hand")
    probe.set_defaults(command=_probe)
    _add_out(probe, "append the row here, not to perf/results")
    return parser


_COMMIT_HELP = "what to record as the commit, in a copy without git"
_GPU_HELP = "without a GPU: the one to predict for (default: H200); may be repeated"


def _add_ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default: all")


def _add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help=what)
    parser.add_argument("--commit", help=_COMMIT_HELP)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="*", type=Path, help="default: *.jsonl in perf/results and in perf/out"
    )
    parser.add_argument(
        "--out", type=Path, default=rows.OUT, metavar="FOLDER", help="default: perf/out"
    )


def _benches(options: argparse.Namespace) -> list[Bench]:
    return [load(op) for op in options.ops or OPS]


def _gpus(options: argparse.Namespace) -> list[str]:
    names = options.gpu or ["H200"]
    return list(GPUS) if "all" in names else list(dict.fromkeys(names))


def _run(options: argparse.Namespace) -> int:
    benches, dtypes = _benches(options), tuple(options.dtype or DTYPES)
    todo = jobs(benches, dtypes, options.cases)
    if not torch.cuda.is_available():
        if options.base:
            print(f"{_NO_GPU} Comparing with {options.base} needs one. Nothing was done.")
            return 2
        gpus = [GPUS[name] for name in _gpus(options)]
        return static.run(benches, dtypes, options.cases, gpus, options.out, options.commit)
    device = torch.device("cuda")
    if options.base:
        return compare.run(todo, options.base, device, options.budget, options.out, options.commit)
    found = run_.run(todo, device, options.out, options.budget, options.resume, options.commit)
    print(run_.table(found))
    return 0


def _plot(options: argparse.Namespace) -> int:
    found = _rows(options)
    for picture in roofline.draw(found, options.out, options.format, options.theme):
        print(picture)
    return 0 if found else 2


def _report(options: argparse.Namespace) -> int:
    found = _rows(options)
    if not found:
        return 2
    for file in report.write(found, options.out):
        print(file)
    if options.readme:
        for file in report.update_readme(options.readme, found):
            print(file)
    return 0


def _rows(options: argparse.Namespace) -> list[rows.Row]:
    files = options.files or rows.files()
    found = rows.read(files)
    if not found:
        where = ", ".join(map(str, options.files or (rows.RESULTS, rows.OUT)))
        print(f"no result rows in {where}: `run` makes some")
    return found


def _tune(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        return candidates.compile_only(_benches(options), [GPUS[name] for name in _gpus(options)])
    return tune.run(
        _benches(options), torch.device("cuda"), options.budget, options.out, options.commit
    )


def _probe(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(machine.datasheet())
        return 0
    device = torch.device("cuda")
    where = machine.gpu(device) | rows.provenance(options.commit)
    roofs = machine.roofs(device, lambda name, why: print(f"no {name}: {why}"))
    file = options.out or rows.RESULTS / f"{rows.slug(where['gpu'])}.jsonl"
    rows.append(file, [{"kind": "probe", "roofs": roofs} | where])
    print(machine.table(roofs, machine.known(where["gpu"])), f"Row: {file}", sep="\n")
    return 0
