"""What is known of the ops without a GPU: counted traffic, launches, and the machine code.

Two subprocesses, since Triton interprets or compiles but does not do both in one: the first runs
every case in small in the interpreter and counts bytes, the second compiles the same launches for
a target. Both need the test tools of a checkout.

    python -m dlops_triton.perf.static focal bf16     the first one: a line of JSON per case
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import OPS, rows
from . import bench as bench_
from .bench import DTYPES, Bench, Case, Work
from .rows import Row

_MODULE = f"{__package__}.static"
_JSON = "row "  # begins the lines that the subprocess prints for its parent


def run(
    benches: Sequence[Bench],
    dtypes: Sequence[str],
    target: str = "sm_90",
    out: Path | None = None,
    commit: str | None = None,
) -> int:
    """Print the report, and write its rows to ``perf/out/static-<target>.jsonl``."""
    if not rows.IN_CHECKOUT:
        print(
            "No GPU found, and the report that needs none is made by the test tools, which are in "
            "a checkout of the repository and not in the installed package. Nothing was done."
        )
        return 2
    sys.path.insert(0, str(rows.ROOT))
    gate = importlib.import_module("tests.tools.compile_gate")
    if target not in gate.TARGETS:
        print(f"no such target: {target}; there are {', '.join(gate.TARGETS)}")
        return 2
    names = [*(bench.name for bench in benches), *dtypes]
    total = len(list(_jobs(benches, dtypes)))
    print("No GPU found: counting and compiling instead. Nothing here is a measurement of speed.")
    with (
        ThreadPoolExecutor(1) as thread,
        tqdm(total=total + 1, unit="step", leave=False) as bar,
    ):
        bar.set_description("starting")
        compiling = thread.submit(gate.run_gate, f"{_MODULE}:{'_'.join(names)}", [target], 1)
        found = []
        for row in _traffic(names):
            bar.set_description(f"counted {row['op']} {row['case']} {row['dtype']} {row['mode']}")
            bar.update()
            found.append(row)
        bar.set_description(f"compiling for {target}")
        while not compiling.done():
            bar.refresh()
            time.sleep(0.2)
        records = compiling.result()
    by_name = {bench.name: bench for bench in benches}
    common = {"kind": "static", "provider": "ours", "target": target} | rows.provenance(commit)
    lanes = gate.TARGETS[target][2]  # of a warp
    found = [_join(row, by_name[row["op"]], records, lanes) | common for row in found]
    file = out or rows.OUT / f"static-{target}.jsonl"
    rows.append(file, found)
    print(report(found), f"Rows: {file}", sep="\n")
    return 0


def _jobs(
    benches: Sequence[Bench], dtypes: Sequence[str]
) -> Iterator[tuple[Bench, Case, str, str]]:
    """The cases of real networks. Sweeps launch the same kernels."""
    for bench in benches:
        for case in bench.cases:
            for dtype in (d for d in case.dtypes if d in dtypes):
                for mode in case.modes:
                    yield bench, case, dtype, mode


def _named(names: Sequence[str]) -> tuple[list[Bench], list[str]]:
    return [bench_.load(n) for n in names if n in OPS], [n for n in names if n in DTYPES]


def _call(bench: Bench, case: Case, dtype: str, mode: str) -> Callable[[], Any]:
    """The library's own work on a case in small."""
    bench.shrink()
    small = case.shrunk()
    inputs = bench.make(small, DTYPES[dtype], torch.device("cpu"))
    return bench_.bind(bench, "ours", small, mode, inputs)


def __getattr__(name: str) -> list[tuple[str, Callable[[], Any]]]:
    """The compile gate's cases: an attribute that is called, for example, ``focal_nms_fp32``."""
    benches, dtypes = _named(name.split("_"))
    if not (benches and dtypes):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return [
        (f"{bench.name} {case.name} {dtype} {mode}", _call(bench, case, dtype, mode))
        for bench, case, dtype, mode in _jobs(benches, dtypes)
    ]


def _traffic(names: Sequence[str]) -> Iterator[Row]:
    """The rows of the first subprocess, as they come."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(rows.ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", _MODULE, *names]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(_JSON):
                yield json.loads(line.removeprefix(_JSON))
    if child.returncode:
        raise RuntimeError("counting traffic in the interpreter failed, as said above")


def _count(names: Sequence[str]) -> None:
    """The first subprocess: count what every case in small asks for."""
    traffic = importlib.import_module("tests.tools.traffic").traffic
    importlib.import_module("tests.tools.interpreter").install_fixes()
    for bench, case, dtype, mode in _jobs(*_named(names)):
        call = _call(bench, case, dtype, mode)
        with _noted_launches() as launches, traffic(sectors=True) as meter:
            call()
        itemsize = DTYPES[dtype].itemsize
        row = {
            "op": bench.name,
            "case": case.name,
            "sizes": dict(case.sizes),
            "small": dict(case.small),
            "mode": mode,
            "dtype": dtype,
            "bytes": bench.bytes(case, mode, itemsize),
            "operations": bench.operations(case, mode),
            "small_bytes": bench.bytes(case.shrunk(), mode, itemsize),
            "requested_bytes": meter.total,
            "sector_bytes": meter.dram,
            "launches": len(launches),
            "kernels": launches,
        }
        print(_JSON + json.dumps(row), flush=True)


@contextlib.contextmanager
def _noted_launches() -> Iterator[list[Row]]:
    """Note of each launch the kernel, and what Triton specialises it by."""
    dispatch: Any = importlib.import_module("dlops_triton._dispatch")
    launch = dispatch.launch
    found: list[Row] = []

    def noted(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        arguments = {name: _token(a) for name, a in zip(kernel.arg_names, args, strict=False)}
        constants = {name: settings[name] for name in kernel.arg_names if name in settings}
        found.append({"kernel": kernel.fn.__name__, "arguments": arguments, "constants": constants})
        launch(kernel, grid, *args, **settings)

    dispatch.launch = noted
    try:
        yield found
    finally:
        dispatch.launch = launch


def _token(argument: Any) -> Any:
    """What of a runtime argument is part of the specialisation, as the compile gate writes it."""
    if isinstance(argument, torch.Tensor):
        name = str(argument.dtype).removeprefix("torch.")
        for long, short in (("bfloat", "bf"), ("float", "fp"), ("int", "i")):
            name = name.replace(long, short)
        return f"*{name}"
    if isinstance(argument, int) and argument != 1:
        kind = "i32" if abs(argument) < 2**31 else "i64"
        return kind if argument % 16 else f"{kind} tt.divisibility=16"
    return "fp32" if isinstance(argument, float) else argument  # None and 1 become constants


def _is_of(record: Any, launch: Row) -> bool:
    """Is this the machine code that a launch would run?"""
    if record.kernel != launch["kernel"]:
        return False
    for name, token in launch["arguments"].items():
        kind = record.arguments.get(name)
        if kind is None and record.constants.get(name, "absent") != token:
            return False
        if kind is not None and token != (kind.split()[0] if kind[0] == "*" else kind):
            return False
    return all(record.constants.get(name) == v for name, v in launch["constants"].items())


def _join(row: Row, bench: Bench, records: Sequence[Any], lanes: int) -> Row:
    """Put the machine code of its kernels, and the instructions of the whole call, into a row."""
    kernels: dict[str, Row] = {}
    per_element: dict[str, list[float | None]] = {}
    for launch in row["kernels"]:
        record = next(record for record in records if _is_of(record, launch))
        kernel = _code(record, bench.kernels[record.kernel], lanes)
        kernels.setdefault(json.dumps(kernel), kernel)
        per_element.setdefault(record.kernel, []).append(kernel["per_element"])
    instructions: float | None = 0.0
    for name, counts in per_element.items():
        work = bench.kernels[name]
        if work is None or work.elements is None or None in counts or instructions is None:
            instructions = None  # a sum with a hole would flatter
        else:
            known = [c for c in counts if c is not None]
            instructions += work.elements(row["sizes"]) * sum(known) / len(known)
    return row | {"kernels": list(kernels.values()), "instructions": instructions}


def _code(record: Any, work: Work | None, lanes: int) -> Row:
    """Of one kernel, what the report says.

    Instructions per element: those of the innermost loop, if there is one, over the elements that
    a pass handles, else those of the whole program over its elements; each instruction of each warp
    counts for all the warp's lanes. Branches are taken to run either side, once.
    """
    code = record.code
    block = None if work is None else work.loop if code.loop_instructions else work.block
    count = code.loop_instructions or code.instructions
    return {
        "kernel": record.kernel,
        "case": record.case,
        "constants": record.constants,
        "error": record.error,
        "registers": code.registers,
        "stack": code.stack,
        "spilled": code.spilled,
        "shared": record.shared,
        "warps": record.num_warps,
        "instructions": code.instructions,
        "loop_instructions": code.loop_instructions,
        "per_element": count * record.num_warps * lanes / block(record.constants)
        if block
        else None,
        "loads": code.counts.get("load"),
        "loads_128": code.counts.get("load_128"),
        "stores": code.counts.get("store"),
        "stores_128": code.counts.get("store_128"),
        "special": code.counts.get("special"),
    }


def report(found: Sequence[Row]) -> str:
    """The two tables, a line per case and a line per kernel, and how to read them."""
    target = found[0]["target"]
    lines = [
        f"NO GPU FOUND, NO SPEED MEASURED: bytes counted in Triton's interpreter, machine code "
        f"compiled for {target}",
        "",
        f"{'op case dtype mode':44} {'compulsory':>12} {'ops/byte':>9} {'requested':>10} "
        f"{'sectors':>8} {'launches':>8} {'instr/op':>8}",
    ]
    for row in found:
        name = f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"
        instructions = row["instructions"]
        lines.append(
            f"{name:44} {row['bytes'] / 1e6:9.2f} MB {row['operations'] / row['bytes']:9.2f} "
            f"{row['requested_bytes'] / row['small_bytes']:9.2f}x "
            f"{row['sector_bytes'] / row['small_bytes']:7.2f}x {row['launches']:8} "
            + (f"{instructions / row['operations']:7.1f}x" if instructions else f"{'-':>8}")
        )
    lines += [
        "",
        f"{'kernel, as first launched by':88} {'regs':>4} {'spill':>5} {'stack':>5} {'shared':>6} "
        f"{'warps':>5} {'instr':>5} {'loop':>5} {'per element':>11} {'loads/128':>9} "
        f"{'stores/128':>10} {'special':>7}",
    ]
    kernels = {json.dumps(kernel): kernel for row in found for kernel in row["kernels"]}
    named: dict[str, Row] = {}
    for kernel in kernels.values():
        name = f"{kernel['kernel']}, {kernel['case']}"
        twin = named.setdefault(name, kernel)["constants"]
        name += "".join(f", {k}={v}" for k, v in kernel["constants"].items() if twin.get(k, v) != v)
        if kernel["error"]:
            lines.append(f"{name:88} NOT COMPILED: {kernel['error'].splitlines()[0]}")
            continue
        per_element = kernel["per_element"]
        lines.append(
            f"{name:88} {kernel['registers']:4} {kernel['spilled']:5} {kernel['stack']:5} "
            f"{kernel['shared']:6} {kernel['warps']:5} {kernel['instructions']:5} "
            f"{kernel['loop_instructions']:5} "
            f"{f'{per_element:.1f}' if per_element else '-':>11} "
            f"{kernel['loads']:>5}/{kernel['loads_128']:<3} "
            f"{kernel['stores']:>6}/{kernel['stores_128']:<3} {kernel['special']:>7}"
        )
    return "\n".join((*lines, "", _NOTES))


_NOTES = """\
compulsory   each input read once and each output written once, by any implementation
ops          fp32 instructions of the leanest known formulation; a fused multiply-add counts once
requested    bytes that active lanes ask for, caches or not, over the compulsory bytes; on a
             smaller problem, so where traffic does not grow in proportion (NMS) it differs
sectors      distinct 32-byte sectors touched, summed over launches, over the same
launches     of Triton kernels, per call; torch's own (sorting, summing partial results) not counted
instr/op     all instructions of a call over ops; "-" where a serial kernel allows no such model
per element  instructions of a loop's pass over the elements it handles, or where there is no loop
             of the whole program over its elements; x warps x lanes; branches count both sides
spill, stack, loads, stores, special: bytes per thread, and instructions in the code; 128: those of
             128 bits and more"""


if __name__ == "__main__":
    _count(sys.argv[1:])
