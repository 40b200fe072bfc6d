"""A run on a GPU: every job in turn, within a budget, kept as it comes."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from . import machine, points, rows, timing
from .bench import Job, amounts
from .rows import Row

# Sampling a provider on a job ends after so long, or sooner where a budget leaves less.
SHARE_S = 3.0
_AGAIN_S = 1.0


class SpentError(BaseException):
    """The budget is spent. Like an interrupt: no handler of a provider's failures may keep it."""


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise :class:`SpentError` in the block once its time is up, whatever it waits for.

    Where no alarm can be set, outside the main thread, only the run's own looks at the clock hold.
    """
    usable = hasattr(signal, "setitimer")
    if seconds is None or not usable or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise SpentError

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again, for some code takes any exception for a failure of its own. A tenth of a
    # second at least: 0 would set no alarm.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    jobs: Sequence[Job],
    device: torch.device,
    file: Path | None = None,
    budget_s: float | None = None,
    resume: bool = False,
    commit: str | None = None,
) -> list[Row]:
    """Measure the roofs, then every job, and append the rows of each as soon as it is done.

    Args:
        file: of the rows; by default that of the GPU, in ``perf/results``.
        budget_s: from now on; what is being measured when it is spent is lost.
        resume: leave out what the file has from the same code, versions and GPU.
        commit: what to record as the commit, in a copy without git.

    Returns:
        The rows that were added, without those of the roofs.
    """
    start = time.monotonic()
    where = machine.gpu(device) | rows.provenance(commit)
    file = file or rows.RESULTS / f"{rows.slug(where['gpu'])}.jsonl"
    todo = _undone(jobs, file, where) if resume else list(jobs)
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} cases are in {file} already.")
    done: list[Row] = []
    if not todo:
        return done
    try:
        with deadline(budget_s), tqdm(todo, unit="case", disable=None) as bar:
            timing.kernel_times(lambda: None, device)  # the profiler slows all launches, or none
            bar.set_description("measuring the roofs")
            roofs = machine.roofs(device, lambda name, why: bar.write(f"no {name}: {why}"))
            rows.append(file, [{"kind": "probe", "roofs": roofs} | where])
            bar.write(f"{where['gpu']}; rows go to {file}")
            for number, job in enumerate(bar):
                left = None if budget_s is None else start + budget_s - time.monotonic()
                if left is not None and left <= 0:
                    raise SpentError
                share = _share(left, len(todo) - number, len(job[0].providers))
                found = [
                    {"kind": "measured", "roofs": roofs} | where | row
                    for row in measured(job, device, bar, share)
                ]
                rows.append(file, found)
                done += found
    except SpentError:
        print(f"The budget of {budget_s:g} s is spent: {_undone_count(todo, done)} not measured.")
    except KeyboardInterrupt:
        print(f"\nInterrupted: {_undone_count(todo, done)} not measured. The rest is in {file}")
    return done


def _share(left: float | None, jobs: int, providers: int) -> float:
    """Seconds of sampling per provider; half of what is left, since preparing takes as long."""
    return SHARE_S if left is None else min(SHARE_S, left / 2 / jobs / providers)


def _key(job: Job) -> Row:
    bench, case, dtype, mode = job
    return {"op": bench.name, "case": case.name, "mode": mode, "dtype": dtype}


def _undone(jobs: Sequence[Job], file: Path, where: Row) -> list[Job]:
    """The jobs of which the file lacks a provider's row by the same code on the same GPU."""
    same = ("gpu", *rows.SAME_CODE)
    done = {
        (row["op"], row["case"], row["mode"], row["dtype"], row["provider"])
        for row in (rows.read_all(file) if file.exists() else ())
        if row["kind"] == "measured" and all(row.get(name) == where.get(name) for name in same)
    }
    return [
        job
        for job in jobs
        if not all((*_key(job).values(), provider) in done for provider in job[0].providers)
    ]


def _undone_count(todo: Sequence[Job], done: Sequence[Row]) -> str:
    finished = {tuple(row[name] for name in ("op", "case", "mode", "dtype")) for row in done}
    return f"{len(todo) - len(finished)} of {len(todo)} cases were"


def measured(job: Job, device: torch.device, bar: Any, share_s: float = SHARE_S) -> list[Row]:
    """The rows of one job, told to a progress bar as they come."""
    bench, case, dtype, mode = job
    name = f"{bench.name} {case.name} {dtype} {mode}"

    def say(provider: str, what: str) -> None:
        bar.set_description(f"{name}: {what} {provider}")
        if what.startswith("left out"):
            bar.write(f"{name}: {provider} {what}")

    found = timing.measure(bench, case, dtype, mode, device, say, share_s=share_s)
    key = _key(job) | {
        "sizes": dict(case.sizes),
        **amounts(bench, case, dtype, mode),
    }
    for row in found:
        if us := row.get("device_p50_us") or row.get("eager_p50_us"):
            bar.set_postfix_str(f"last: {row['provider']} {us:.1f} us")
    return [key | row for row in found]


def table(found: Sequence[Row]) -> str:
    """Measured rows, a line each; "of floor" is the floor's time over the device's p50."""
    lines = [
        f"{'op case dtype mode':44} {'provider':11} {'cold us':>9} {'warm us':>9} {'eager us':>9} "
        f"{'of floor':>8} {'launches':>8} {'syncs':>5} {'MB extra':>8} {'1st call s':>10} "
        f"{'error':>7}"
    ]
    for row in found:
        name = f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"
        start = f"{name:44} {row['provider']:11}"
        if row.get("left_out"):
            lines.append(f"{start} left out: {row['left_out']}")
            continue
        point = points.point(row)
        lines.append(
            f"{start} {_number(row['device_p50_us'])} {_number(row['warm_p50_us'])} "
            f"{_number(row['eager_p50_us'])} {f'{point.share:.0%}' if point else '-':>8} "
            f"{row['launches'] or '-':>8} {_or_dash(row['synchronisations']):>5} "
            f"{_or_dash(row['peak_memory'] and row['peak_memory'] // 10**6):>8} "
            f"{row['first_call_s']:10.2f} {_error(row['error']):>7}"
        )
    return "\n".join(lines)


def _number(us: float | None) -> str:
    return f"{'-' if us is None else f'{us:.1f}':>9}"


def _error(error: float | None) -> str:
    return "unlike" if error is None else f"{error:.0e}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
