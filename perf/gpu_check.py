"""``make gpu-check``: all that a GPU can say of a checkout, in nine minutes and without a network.

Each step is a process that is ended, with its children, when its time is up; the next one follows
whatever became of it. Logs, results and a summary go to the folder that the environment variable
OUT names (default: ``perf/out``), eight files at most.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import machine, rows, sanitize
from .rows import Row

TOTAL_S = 530.0  # nine minutes, less the time to end the last step and to copy
GRACE_S = 5.0  # between asking a step to end and ending it

Reading = tuple[bool, str]  # is all well, and what was said


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    limit_s: float
    log: str
    read: Callable[[int, str], Reading]  # from the exit status and the output
    environment: Mapping[str, str] = field(default_factory=dict)
    skipped: str = ""  # why, or empty
    needs_s: float = 0.0  # that the steps before leave it


@dataclass(frozen=True)
class Result:
    step: str
    outcome: str  # "ok", "failed", "timed out" or "skipped"
    seconds: float
    says: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument(
        "--commit",
        default=os.environ.get("COMMIT"),
        help="what to record as the commit, in a copy without git (default: $COMMIT)",
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("No GPU found, and all of this check is about one. Nothing was done.")
        return 2
    if not rows.IN_CHECKOUT:
        print("The tests are in a checkout of the repository only. Nothing was done.")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no step outlives this process
    where = machine.gpu(torch.device("cuda")) | rows.provenance(options.commit)
    slug = rows.slug(where["gpu"])
    results = rows.RESULTS / f"{slug}.jsonl"
    out = Path(os.environ.get("OUT") or rows.OUT)
    with tempfile.TemporaryDirectory(prefix="dlops-gpu-check-") as scratch:
        made = Path(scratch)
        todo = steps(results, made, where["date"], options.commit)
        wanted = (results, made / "report.html", made / f"roofline-{slug}.png")
        return check(todo, out, wanted, where)


def steps(results: Path, made: Path, since: str, commit: str | None = None) -> list[Step]:
    """The real ones.

    Args:
        results: the file that the lab appends the rows of this GPU to.
        made: a folder for pictures, the report, and the cache of compiled kernels.
        since: a row is of this check if its date is not earlier.
    """
    python = sys.executable
    lab = (python, "-m", "dlops_triton.perf")
    commits = ("--commit", commit) if commit else ()
    workers = min(16, os.cpu_count() or 1)
    pytest = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    xdist = ("-n", str(workers), "--dist", "loadgroup") if importlib.util.find_spec("xdist") else ()
    tool = find_sanitizer()
    missing = "" if tool else "compute-sanitizer is not here"
    sanitized = (python, "-m", sanitize.__name__)
    memcheck = ("memcheck", "--report-api-errors", "no")  # python tells of those that matter
    racecheck = ("racecheck", "--kernel-name", "kernel_substring=_kernel")  # not those of CUB
    cache = {"TRITON_CACHE_DIR": str(made / "triton")}  # cold for the tests, warm from then on
    # Out of bounds must be outside an allocation, not in a neighbour's half of one.
    exact = cache | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(
            "tests",
            # pytest-benchmark, where it is, warns of xdist, and a warning is an error.
            (python, "-m", "pytest", "tests", "-q", "-p", "no:benchmark", *xdist),
            240,
            "tests.log",
            read_pytest,
            cache,
            pytest,
        ),
        *(
            Step(
                options[0],
                (tool or "", "--tool", *options, *_SANITIZER_OPTIONS, *sanitized),
                45,
                "sanitizer.log",
                read_sanitizer,
                exact,
                missing,
            )
            for options in (memcheck, racecheck)
        ),
        Step("probe", (*lab, "probe", *commits), 45, "perf.log", last_line, cache),
        Step(
            "run",
            # NMS first: it is what torch.compile has no part in, and so soon measured.
            (*lab, "run", "nms", "iou", "focal", "--cases", "real", "--budget", "200", *commits),
            215,
            "perf.log",
            lambda status, said: read_rows(status, said, results, since),
            cache,
        ),
        Step("report", (*lab, "report", "--out", str(made)), 30, "perf.log", last_line, needs_s=25),
        Step(
            "plot",
            (*lab, "plot", str(results), "--format", "png", "--out", str(made)),
            30,
            "perf.log",
            last_line,
            needs_s=15,
        ),
    ]


_SANITIZER_OPTIONS = ("--target-processes", "application-only", "--error-exitcode", "9")


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def check(
    todo: Sequence[Step],
    out: Path,
    wanted: Iterable[Path],
    where: Row,
    total_s: float = TOTAL_S,
) -> int:
    """Take the steps, copy the files that are wanted of what they made, and sum up.

    Returns:
        The exit code: 0 if nothing failed.
    """
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for log in {step.log for step in todo}:
        (out / log).unlink(missing_ok=True)
    found: list[Result] = []
    try:
        for number, step in enumerate(todo, 1):
            left_s = total_s - (time.monotonic() - start)
            left_s -= sum(later.needs_s for later in todo[number:])
            limit_s = min(step.limit_s, left_s)
            print(f"{step.name} ...", flush=True)
            found.append(take(step, out / step.log, limit_s))
            print(f"  {found[-1].outcome}: {found[-1].says}", flush=True)
            _sum_up(found, out, where)  # so that something is left if this process is ended
    except KeyboardInterrupt:
        found.append(Result("the rest", "failed", 0.0, "interrupted"))
    for file in wanted:
        if file.exists():
            shutil.copyfile(file, out / re.sub(r"[^A-Za-z0-9._-]", "-", file.name))
    print(f"\n{_sum_up(found, out, where)}")
    return int(any(result.outcome not in ("ok", "skipped") for result in found))


def take(step: Step, log: Path, limit_s: float) -> Result:
    """Run one step, its output at the end of a log."""
    if step.skipped or limit_s < 1:
        return Result(step.name, "skipped", 0.0, step.skipped or "no time was left")
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(rows.ROOT), environment.get("PYTHONPATH")))
    )
    start = time.monotonic()
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(step.command)}\n".encode())
        output.flush()
        begin = output.tell()
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=rows.ROOT,
                env=environment | dict(step.environment),
                start_new_session=True,  # a process group of its own, to be ended as one
            )
        except OSError as e:
            return Result(step.name, "failed", 0.0, str(e))
        late = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            _signal(process, signal.SIGINT)  # pytest and the lab then say what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            _signal(process, signal.SIGKILL)
            status = process.wait()
    seconds = time.monotonic() - start
    said = log.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n")
    well, says = step.read(status, said)
    if late:
        return Result(step.name, "timed out", seconds, f"after {limit_s:.0f} s; {says}")
    return Result(step.name, "ok" if well else "failed", seconds, says)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the process, if it still runs, and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_line(status: int, said: str) -> Reading:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return status == 0, lines[-1][:200] if lines else f"nothing, exit status {status}"


def read_pytest(status: int, said: str) -> Reading:
    """Counts, and the names of the first few tests that failed."""
    totals = re.findall(r"^.*\d (?:passed|failed|skipped|errors?)\b.* in [\d.]+s.*$", said, re.M)
    if not totals:
        return False, last_line(status, said)[1]
    counts = re.findall(r"\d+ (?:passed|failed|skipped|xfailed|xpassed|errors?)\b", totals[-1])
    summary = said.rpartition("short test summary info")[2]
    failed = re.findall(r"^(?:FAILED|ERROR) (?:\S+?::)?(.+?)(?: - .*)?$", summary, re.M)
    more = [f"and {len(failed) - 5} more"] if len(failed) > 5 else []
    names = f": {', '.join([*failed[:5], *more])}" if failed else ""
    return status == 0, ", ".join(counts) + names


def read_sanitizer(status: int, said: str) -> Reading:
    """How many errors, and the first of them."""
    summary = re.search(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", said, re.M)
    if summary is None:
        return False, last_line(status, said)[1]
    none = re.search(r"\b0 errors", summary[1]) is not None
    if none and sanitize.DONE not in said:
        return False, f"{summary[1]}, but the calls did not all come back"
    finding = re.search(
        r"^=+ (?! |COMPUTE-SANITIZER|\w+ SUMMARY)(.+)(?:\n=+ +(at .+))?", said, re.M
    )
    first = f"; first: {' '.join(filter(None, finding.groups()))}" if finding else ""
    return none and status == 0, summary[1] + first


def read_rows(status: int, said: str, results: Path, since: str) -> Reading:
    """How many rows the lab has added."""
    if status or not results.exists():
        return False, last_line(status, said)[1]
    new = [
        row
        for row in rows.read_all(results)
        if row.get("kind") == "measured" and row.get("date", "") >= since
    ]
    left_out = sum("left_out" in row for row in new)
    spent = [line for line in said.splitlines() if line.startswith("The budget")]
    says = "; ".join([f"measured: {len(new) - left_out}, left out: {left_out}", *spent])
    return len(new) > left_out, says


def _sum_up(found: Sequence[Result], out: Path, where: Row) -> str:
    lines = [f"{name}: {where[name]}" for name in ("gpu", "driver", "torch", "triton", "commit")]
    lines += ["", f"{'step':10} {'outcome':10} {'seconds':>7}  what it says"]
    lines += [f"{r.step:10} {r.outcome:10} {r.seconds:7.1f}  {r.says}" for r in found]
    text = "\n".join(lines)
    whole = where | {"steps": [dataclasses.asdict(result) for result in found]}
    (out / "summary.txt").write_text(text + "\n")
    (out / "summary.json").write_text(json.dumps(whole, indent=1) + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
