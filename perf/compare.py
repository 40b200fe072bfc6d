"""The library against itself at another commit: ``run --base``, interleaved on one device.

The other commit is checked out into a temporary worktree. Two processes, one per commit, hold the
same job at the same time, and this one asks them in turn for a sample: base, ours, ours, base, and
so on. A ratio is that of two samples taken one after the other, so that clocks that drift, and
neighbours that come and go, meet both sides alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from . import machine, rows
from .bench import Job
from .rows import Row

Samples = dict[str, dict[str, list[float]]]  # in seconds, by clock and side

# Each job is set up so often, in other memory: where it lies makes a difference, which so becomes
# part of the spread.
PAIRINGS = 2
ROUNDS = (10, 30)  # samples of each clock, side and pairing, at least and at most
SHARE_S = 3.0  # of one pairing, after the least number
ANSWER_S = 300.0  # a process that takes longer for one reply is taken for dead
NOISE = 0.01  # a difference of less is none, whatever the spread

_WORKER = Path(__file__).with_name("compare_worker.py")


class BaseError(Exception):
    """There is no such commit here, or it cannot be measured."""


class LeftOutError(Exception):
    """A job that a side cannot do, and why."""


class DiedError(LeftOutError):
    """The process of a side ended, and the end of what it said."""


class Worker:
    """One side: a process that is started when it is needed, and again after it died."""

    def __init__(self, name: str, library: Path, device: torch.device) -> None:
        self.name = name
        self._command = [sys.executable, str(_WORKER), str(library), str(device)]
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None
        self._is_ready = False

    def start(self) -> None:
        """Start the process and do not wait for it."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which then stops this
        )

    def wait(self) -> None:
        """Until the process has imported its library.

        Raises:
            DiedError: it could not.
        """
        if self._process is None:
            self.start()
        if not self._is_ready:
            self._reply()
            self._is_ready = True

    def ask(self, what: str, **about: Any) -> Row:
        """The reply to a request.

        Raises:
            LeftOutError: the side refuses it, or died of it.
        """
        self.wait()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no reply, which says why
            self._process.stdin.write(json.dumps({"ask": what, **about}) + "\n")
            self._process.stdin.flush()
        reply = self._reply()
        if "refused" in reply:
            raise LeftOutError(f"{self.name}: {reply['refused']}")
        return reply

    def release(self) -> None:
        """Let the process free the memory of its job."""
        if self._is_ready:
            with contextlib.suppress(DiedError):
                self.ask("done")

    def _reply(self) -> Row:
        assert self._process is not None
        assert self._process.stdout is not None
        line, reason = "", f"gave no answer for {ANSWER_S:.0f} s"
        if select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            line, reason = self._process.stdout.readline(), "died"
        if not line:
            raise DiedError(f"{self.name}: its process {reason}\n{self.stop()}".rstrip())
        reply: Row = json.loads(line)
        return reply

    def stop(self) -> str:
        """End the process, and give the end of what it said."""
        if self._process is None or self._errors is None:
            return ""
        self._process.kill()
        self._process.communicate()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        self._process = self._errors = None
        self._is_ready = False
        return "\n".join(f"    {line}" for line in said[-12:])


def run(
    jobs: Sequence[Job],
    base: str,
    device: torch.device,
    budget_s: float | None = None,
    out: Path | None = None,
    commit: str | None = None,
) -> int:
    """Compare the present tree with commit ``base``, and append rows to a file of ``perf/out``.

    Args:
        base: anything that names a commit to git.
        budget_s: start no job after so long.
        out: the file of the rows.
        commit: what to record as the commit of the present tree.

    Returns:
        The exit code: 0; 1 if nothing could be compared; 2 if there is no such commit.
    """
    start = time.monotonic()
    done: list[Row] = []
    left_out: list[str] = []
    try:
        with (
            _interruptible(),
            _worktree(base) as (base_commit, library),
            _workers(library, device) as sides,
            tqdm(jobs, unit="case") as bar,
        ):
            gpu = machine.gpu(device) if device.type == "cuda" else {"gpu": "CPU"}
            common = {"kind": "compared", "provider": "ours", "base": base_commit, **gpu}
            common |= rows.provenance(commit)
            file = out or rows.OUT / f"compare-{rows.slug(common['gpu'])}.jsonl"
            bar.write(f"{common['commit']} against {base} ({base_commit}) on {common['gpu']}")
            for number, job in enumerate(bar):
                if budget_s is not None and time.monotonic() - start > budget_s:
                    left_out.append(f"{len(jobs) - number} cases: the budget is spent")
                    break
                key = _key(job)
                bar.set_description(_name(key))
                try:
                    row = key | summary(_samples(sides, job, base)) | common
                except LeftOutError as e:
                    left_out.append(f"{_name(key)}: {e}")
                    bar.write(f"not compared: {left_out[-1]}")
                    for worker in sides.values():
                        worker.release()
                else:
                    rows.append(file, [row])
                    done.append(row)
                    bar.set_postfix_str(f"last: {_outcome(row, row['clocks'][0])}")
    except BaseError as e:
        print(e)
        return 2
    except KeyboardInterrupt:
        left_out.append("the rest: interrupted")
    if done:
        print(table(done), f"Rows: {file}", sep="\n")
    for line in left_out:
        print(f"not compared: {line}")
    return 0 if done else 1


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What would end the process at once is an interrupt here, so that worktrees are removed."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _worktree(base: str) -> Iterator[tuple[str, Path]]:
    """The hash of a commit, and the folder of its library in a worktree that is removed after.

    Raises:
        BaseError: there is no such commit, or no library in it.
    """
    git = ("git", "-C", str(rows.ROOT))
    if rows.said(*git, "rev-parse", "--is-inside-work-tree") != "true":
        raise BaseError(f"--base needs a git checkout; {rows.ROOT} is none, or git is not here")
    found = rows.said(*git, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if not found:
        raise BaseError(f"--base: git knows no commit {base!r}")
    inside = rows.said(*git, "rev-parse", "--show-prefix") or ""
    folder = tempfile.mkdtemp(prefix="dlops-base-")
    tree = Path(folder, "tree")
    add = [*git, "worktree", "add", "--detach", "--quiet", str(tree), found]
    try:
        added = subprocess.run(add, capture_output=True, text=True, check=False)
        if added.returncode:
            raise BaseError(f"--base: no worktree of {base}: {added.stderr.strip()}")
        if not (tree / inside / "dlops_triton").is_dir():
            raise BaseError(f"--base: {base} ({found[:12]}) has no dlops_triton")
        yield found[:12], tree / inside
    finally:
        remove = [*git, "worktree", "remove", "--force", str(tree)]
        subprocess.run(remove, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([*git, "worktree", "prune"], capture_output=True, check=False)


@contextlib.contextmanager
def _workers(library: Path, device: torch.device) -> Iterator[dict[str, Worker]]:
    sides = {
        "ours": Worker("the present tree", rows.ROOT, device),
        "base": Worker("the base", library, device),
    }
    try:
        for worker in sides.values():
            worker.start()
        for worker in sides.values():
            try:
                worker.wait()
            except DiedError as e:
                raise BaseError(f"--base: {e}") from e
        yield sides
    finally:
        for worker in sides.values():
            worker.stop()


def _samples(sides: Mapping[str, Any], job: Job, base: str) -> Samples:
    """Take samples of one job, of either side in turn.

    Raises:
        LeftOutError: a side cannot do the job.
    """
    bench, case, dtype, mode = job
    request = {"op": bench.name, "case": dataclasses.asdict(case), "dtype": dtype, "mode": mode}
    samples: Samples = {}
    for pairing in range(PAIRINGS):
        for side in ("ours", "base"):
            reply = sides[side].ask("prepare", **request)
            if "absent" in reply:
                new = f"new since {base}: " if side == "base" else ""
                raise LeftOutError(f"{new}{reply['absent']}")
            for clock in reply["clocks"]:
                samples.setdefault(clock, {"base": [], "ours": []})
        start = time.monotonic()
        for i in range(ROUNDS[1]):
            turn = ("base", "ours") if (pairing + i) % 2 == 0 else ("ours", "base")
            for side in turn:
                for clock, seconds in sides[side].ask("sample")["seconds"].items():
                    samples[clock][side].append(seconds)
            if i + 1 >= ROUNDS[0] and time.monotonic() - start > SHARE_S:
                break
        for worker in sides.values():
            worker.release()
    return samples


def summary(samples: Samples) -> Row:
    """The part of a row that was measured. Ratios are base / ours: above 1 is faster than base."""
    row: Row = {"clocks": list(samples)}
    for clock, of in samples.items():
        low, middle, high = np.quantile(np.divide(of["base"], of["ours"]), (0.2, 0.5, 0.8))
        row |= {
            f"{clock}_base_p50_us": round(float(np.median(of["base"])) * 1e6, 3),
            f"{clock}_ours_p50_us": round(float(np.median(of["ours"])) * 1e6, 3),
            f"{clock}_ratio_p20": round(float(low), 4),
            f"{clock}_ratio_p50": round(float(middle), 4),
            f"{clock}_ratio_p80": round(float(high), 4),
            f"{clock}_verdict": verdict(low, middle, high),
            "samples": len(of["ours"]),
        }
    return row


def verdict(low: float, middle: float, high: float) -> str:
    """A word for a ratio with its spread."""
    if low > 1 and middle > 1 + NOISE:
        return "faster"
    if high < 1 and middle < 1 / (1 + NOISE):
        return "slower"
    return "same"


def _key(job: Job) -> Row:
    bench, case, dtype, mode = job
    return {
        "op": bench.name,
        "case": case.name,
        "sizes": dict(case.sizes),
        "dtype": dtype,
        "mode": mode,
    }


def _name(row: Row) -> str:
    return f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"


def _outcome(row: Row, clock: str) -> str:
    low, middle, high = (row[f"{clock}_ratio_{name}"] for name in ("p20", "p50", "p80"))
    return f"{middle:.3f} ({low:.3f} to {high:.3f}) {row[f'{clock}_verdict']}"


def table(done: Sequence[Row]) -> str:
    """A line per case and clock, then the geometric mean of each op's ratios."""
    lines = [
        f"{'op case dtype mode':52} {'clock':6} {'base us':>10} {'ours us':>10} "
        "base / ours, p50 (p20 to p80)"
    ]
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in done:
        for clock in row["clocks"]:
            ratios.setdefault((row["op"], clock), []).append(row[f"{clock}_ratio_p50"])
            base, ours = (row[f"{clock}_{side}_p50_us"] for side in ("base", "ours"))
            lines.append(
                f"{_name(row):52} {clock:6} {base:10.1f} {ours:10.1f} {_outcome(row, clock)}"
            )
    for (op, clock), of in sorted(ratios.items()):
        mean = math.exp(sum(map(math.log, of)) / len(of))
        lines.append(f"{f'{op}, geometric mean of {len(of)}':52} {clock:6} {'':21} {mean:.3f}")
    return "\n".join(lines)
