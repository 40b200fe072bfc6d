"""``python -m dlops_triton check``: does the library work on this machine, and what runs what?

Every public op is called, forward and backward, and compared with the numpy reference: on a GPU its
compiled kernels, without one its kernels in Triton's interpreter; and the implementation of CPU
tensors. Exit status 0 if all is well, 1 if an op gives a wrong answer or raises, 2 for bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import torch
import triton

from . import _check_run
from ._check_cases import CASES
from ._machine import header, machine, wrapped

WORKER: Sequence[str] = (sys.executable, "-m", _check_run.__name__)
PATIENCE_S = 300.0  # with one op, which may have kernels to compile

Json = dict[str, Any]


class Run(NamedTuple):
    """One implementation of the ops."""

    name: str
    words: str  # what it is, and what it shows
    device: str
    dtypes: tuple[str, ...]
    interpreted: bool = False
    workers: int = 1


def runs() -> list[Run]:
    """The implementations that this machine has."""
    reference = Run(
        "reference",
        "the numpy reference, which is what CPU tensors run; compared with itself, so that dtypes, "
        "shapes, autograd and registration are checked, not the numbers",
        "cpu",
        tuple(_check_run.DTYPES),
    )
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        kernel = Run(
            "kernel",
            f"the kernels, compiled by Triton {triton.__version__} for {name}: what CUDA and ROCm "
            "tensors run",
            "cuda",
            tuple(_check_run.DTYPES),
            workers=min(4, os.cpu_count() or 1),  # compiling is most of the work
        )
        return [kernel, reference]
    interpreter = Run(
        "interpreter",
        f"the kernels, in Triton {triton.__version__}'s interpreter, for there is no GPU; not in "
        "bf16, in which it is wrong. What a compiler makes of them, only a GPU can show",
        "cpu",
        ("fp32", "fp16"),
        interpreted=True,
    )
    return [interpreter, reference]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: with status 2, for arguments that are wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m dlops_triton", description=__doc__)
    command = parser.add_subparsers(metavar="check", required=True).add_parser(
        "check", help="compare every op with the numpy reference on this machine"
    )
    command.add_argument("ops", nargs="*", metavar="op", help="of these only (default: all)")
    command.add_argument("--json", action="store_true", help="print one JSON object, for a report")
    options = parser.parse_args(argv)
    if unknown := [op for op in options.ops if op not in CASES]:
        command.error(f"no such op: {', '.join(unknown)}; there are {', '.join(CASES)}")

    begin = time.monotonic()
    here, todo = machine(), runs()
    if not options.json:
        print(header(here), end="\n\n", flush=True)
    progress = Progress(sys.stderr)
    try:
        results = check(todo, list(dict.fromkeys(options.ops)) or list(CASES), progress)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    finally:
        progress.close()
    ok = all(result["ok"] for result in results)
    seconds = round(time.monotonic() - begin, 1)
    if options.json:
        how = {run.name: run.words for run in todo}
        print(json.dumps(here | {"run_by": how, "results": results, "seconds": seconds, "ok": ok}))
    else:
        print(table(todo, results))
        print(f"\n{verdict(results)} It took {seconds:.0f} s.")
    return 0 if ok else 1


class Progress:
    """How far it is: on a terminal a line that is written over, elsewhere a line now and then."""

    def __init__(self, out: TextIO):
        self._out, self._terminal = out, out.isatty()
        self._begin = self._said = time.monotonic()
        self._width = 0

    def show(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        text = f"checking, {done} of {total} ({now - self._begin:.0f} s): {what}"
        if self._terminal:
            self._out.write(f"\r{text:<{self._width}}")
            self._width = len(text)
        elif now - self._said >= 5:
            self._out.write(f"{text}\n")
            self._said = now
        self._out.flush()

    def close(self) -> None:
        if self._terminal:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()


def check(todo: Sequence[Run], ops: Sequence[str], progress: Progress) -> list[Json]:
    """Every op by every implementation, in the order of ``todo`` and ``ops``."""
    said: queue.Queue[Json] = queue.Queue()
    shares = [(run, list(ops[i :: run.workers])) for run in todo for i in range(run.workers)]
    threads = [
        threading.Thread(target=_work, args=(run, share, said), daemon=True)
        for run, share in shares
        if share
    ]
    for thread in threads:
        thread.start()
    total = len(todo) * len(ops)
    found: dict[tuple[str, str], Json] = {}
    progress.show(0, total, "starting")
    while len(found) < total:
        result = said.get()
        found[result["run_by"], result["op"]] = result
        progress.show(len(found), total, f"{result['op']}, {result['run_by']}")
    return [found[run.name, op] for run in todo for op in ops]


def _work(run: Run, ops: list[str], said: queue.Queue[Json]) -> None:
    """Have ops run in a process of their own, and in another one after each that ends it."""
    while ops:
        ready, status = False, 0
        with tempfile.TemporaryFile() as errors:
            for message in _messages(run, ops, errors):
                ready = ready or "ready" in message
                status = message.get("ended", 0)
                if op := message.get("op"):
                    said.put(_result(run, op, message["dtypes"]))
                    ops = ops[1:]
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no word"]
        # One that does not even start will not start for the others.
        for op in ops[:1] if ready else ops:
            ended = f"the process that ran it ended with status {status}: {lines[-1]}"
            said.put(_result(run, op, {}, ended))
        ops = ops[1:] if ready else []


def _messages(run: Run, ops: Sequence[str], errors: Any) -> Iterator[Json]:
    """What a worker says, until it ends, or is ended because it says nothing for too long."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if run.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    if run.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    command = [*WORKER, run.device, ",".join(run.dtypes), ",".join(ops)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment
    ) as process:
        assert process.stdout is not None
        while True:
            timer = threading.Timer(PATIENCE_S, _end, (process, errors))
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                break
            with contextlib.suppress(ValueError):  # the half line of a process that was ended
                yield json.loads(line)
        yield {"ended": process.wait()}


def _end(process: subprocess.Popen[bytes], errors: Any) -> None:
    errors.write(f"\nit said nothing for {PATIENCE_S:.0f} s".encode())
    errors.flush()
    process.kill()


def _result(run: Run, op: str, by_dtype: Json, error: str = "") -> Json:
    """One row: the worst output of all dtypes, and every problem in words."""
    problems = [error] if error else []
    raised = bool(error)
    worst: Json = {"difference": None, "accepted": None}
    most = -1.0
    for dtype, found in by_dtype.items():
        if found["error"]:
            raised = True
            problems.append(f"{dtype} raised {found['error']}")
        for output in found["outputs"]:
            if output["problem"]:
                problems.append(f"{dtype}, {output['what']}: {output['problem']}")
            share = _share(output)
            if share > most:
                most, worst = share, output
    status = "RAISED" if raised else "MISMATCH" if problems else "ok"
    return {
        "op": op,
        "run_by": run.name,
        "dtypes": list(by_dtype),
        "difference": worst["difference"],
        "accepted": worst["accepted"],
        "seconds": round(sum(found["seconds"] for found in by_dtype.values()), 2),
        "status": status,
        "ok": status == "ok",
        "problems": problems,
    }


def _share(output: Json) -> float:
    """The difference over what is accepted."""
    if output["difference"] is None:
        return float("inf")
    if output["accepted"]:
        return float(output["difference"] / output["accepted"])
    return float("inf") if output["difference"] else 0.0


def table(todo: Sequence[Run], results: Sequence[Json]) -> str:
    """A row for each op and implementation, the problems, and what the implementations are."""
    wide = max(len(result["op"]) for result in results)
    head = f"{'op':<{wide}}  {'run by':<11}  {'dtypes':<14}  {'difference':>10}  {'accepted':>8}"
    lines = [f"{head}  {'s':>5}"]
    for r in results:
        accepted = "exact" if r["accepted"] == 0 else _number(r["accepted"])
        lines.append(
            f"{r['op']:<{wide}}  {r['run_by']:<11}  {' '.join(r['dtypes']):<14}  "
            f"{_number(r['difference']):>10}  {accepted:>8}  {r['seconds']:>5.1f}  "
            f"{r['status']}"
        )
    for r in results:
        lines += [f"\n{r['op']} by {r['run_by']}" for _ in r["problems"][:1]]
        lines += [f"  {problem}" for problem in r["problems"]]
    lines.append("\nRun by")
    lines += [wrapped(f"  {run.name:<11}  {run.words}.", 15) for run in todo]
    words = "Difference, accepted: of all results and gradients, where there is least to spare."
    lines.append(words)
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def verdict(results: Sequence[Json]) -> str:
    """One line: all is well, or what is not."""
    wrong = sorted({result["op"] for result in results if not result["ok"]})
    if wrong:
        return f"NOT OK: {', '.join(wrong)}."
    return f"All {len({result['op'] for result in results})} ops agree with the numpy reference."
