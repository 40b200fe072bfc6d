"""Compile every kernel for GPUs that are not here, just as the library launches it.

The public functions run on CPU tensors, but what a launch would run is compiled instead, through
Triton's own path from arguments to code: specialisation, constants and options are the real ones.
No kernel runs, so what the functions return is garbage. The result is read from the machine code.

    python -m tests.tools.compile_gate --targets sm_90 --cases tests.tools.planted:CASES

Interpreter and compiler exclude each other in a process, so the work is done in subprocesses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .machine_code import MachineCode

# Name: backend, architecture, threads in a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    **{f"sm_{arch}": ("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)},
    **{arch: ("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")},
}
CASES = "tests.gate_cases:CASES"

# Between this module and its workers.
CASE_RAISED = 3  # exit status
DIED = "the compiler ended the process"

_ROOT = Path(__file__).parents[2]


@dataclass
class Record:
    """One kernel, as specialised by one launch, for one target."""

    case: str  # the first that launched it
    kernel: str
    target: str
    constants: dict[str, Any]  # constexprs, and arguments that Triton made constants: None and 1
    arguments: dict[str, str]  # type and divisibility of the others
    num_warps: int
    error: str = ""  # what the compiler said, if it did not deliver; do not trust the rest then
    seconds: float = 0.0
    shared: int = 0  # bytes per program
    code: MachineCode = field(default_factory=MachineCode)
    ptx: str = ""

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel}[{values}] {self.target} ({self.case})"


# Each takes some seconds to start; beside them, tests may be running.
PROCESSES = min(8, max(2, (os.cpu_count() or 2) // 2))


def run_gate(
    cases: str = CASES, targets: Sequence[str] = tuple(TARGETS), processes: int = PROCESSES
) -> list[Record]:
    """Compile every launch of `cases` for every target.

    Args:
        cases: module and name of a list of (name, function without arguments).
        targets: names out of `TARGETS`.
        processes: how many share the work. Triton's disk cache makes a repetition quick.

    Returns:
        A record for each different specialisation and target, refused ones included.

    Raises:
        RuntimeError: a case raised an exception.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (str(_ROOT), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # Cases make CPU tensors, on any machine; the compilers fill the cores.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        workers = []
        for i in range(processes):
            file = Path(folder) / f"{i}.jsonl"
            arguments = [cases, ",".join(targets), f"{i}/{processes}", str(file)]
            workers.append(pool.submit(_run_worker, arguments, environment, file))
        by_job = {job: line for worker in workers for job, line in worker.result().items()}
    return [_from_json(by_job[job]) for job in sorted(by_job)]


def _run_worker(arguments: list[str], environment: dict[str, str], file: Path) -> dict[int, Any]:
    """Do one share of the work, starting again after each job that ends the process."""
    command = [sys.executable, "-m", f"{__spec__.parent}.gate_worker", *arguments]
    log = file.with_suffix(".log")
    lines: dict[int, Any] = {}
    while True:
        last = max(lines, default=0)
        with log.open("ab") as said:
            status = subprocess.run(
                [*command, str(last)], env=environment, stdout=said, stderr=said, check=False
            ).returncode
        for line in file.read_text().splitlines() if file.exists() else ():
            fields = json.loads(line)
            lines[fields.pop("job")] = fields
        if status == 0:
            return lines
        text = log.read_text(errors="replace").rstrip()
        reached = max(lines, default=0)
        if status == CASE_RAISED or reached == last:
            raise RuntimeError(f"the compile gate could not run its cases:\n{text[-4000:]}")
        lines[reached]["error"] = f"{DIED}: {text.splitlines()[-1]}"
        file.unlink()


def save(records: Iterable[Record], file: Path) -> None:
    """Write records as lines of JSON."""
    file.write_text("".join(f"{json.dumps(asdict(record))}\n" for record in records))


def load(file: Path) -> list[Record]:
    """Read what `save` wrote."""
    return [_from_json(json.loads(line)) for line in file.read_text().splitlines()]


def _from_json(fields: dict[str, Any]) -> Record:
    return Record(**fields | {"code": MachineCode(**fields["code"])})


_HEADER = (
    "target  warps  regs stack spill shared  instr  loop  ld/128  st/128  atom  mufu   bar  seconds"
)


def _row(record: Record) -> str:
    if record.error:
        first, *others = record.error.splitlines()
        reason = " ... ".join((first, *others[-1:]))  # in between: the source
        return f"{record.target:7} REFUSED {record}: {reason}"
    code, n = record.code, record.code.counts
    loads, stores = f"{n['load']}/{n['load_128']}", f"{n['store']}/{n['store_128']}"
    atomics = n["atomic"] + n.get("reduction", 0)
    return (
        f"{record.target:7} {record.num_warps:5} {code.registers:5} {code.stack:5} "
        f"{code.spilled:5} {record.shared:6} {code.instructions:6} {code.loop_instructions:5} "
        f"{loads:>7} {stores:>7} {atomics:5} {n['special']:5} {n['barrier']:5} "
        f"{record.seconds:8.1f}  {record}"
    )


def main() -> None:
    """Print a table of what the cases compile to."""
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs not here.")
    parser.add_argument("--cases", default=CASES, help="module:NAME of a list of (name, function)")
    parser.add_argument("--targets", default=",".join(TARGETS), help="separated by commas")
    parser.add_argument("--json", type=Path, help="write the records here, one per line")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args()
    records = run_gate(options.cases, options.targets.split(","), options.processes)
    if options.json:
        save(records, options.json)
    sys.stdout.write("\n".join((_HEADER, *map(_row, records), "")))


if __name__ == "__main__":
    main()
