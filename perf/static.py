"""What is known of the ops without a GPU: counted traffic, machine code, and times predicted of it.

Two subprocesses do the work (``counting.py``), since Triton interprets or compiles but does not do
both in one. Both need the test tools of a checkout.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import counting, model, rows
from .bench import DTYPES, Bench, Work
from .gpus import Gpu
from .points import point
from .rows import Row

_MODULE = f"{__package__}.counting"


def run(
    benches: Sequence[Bench],
    dtypes: Sequence[str],
    cases: str,
    gpus: Sequence[Gpu],
    out: Path | None = None,
    commit: str | None = None,
) -> int:
    """Print the report, and append its rows to ``out``, by default ``perf/out/predicted.jsonl``."""
    if not rows.IN_CHECKOUT:
        print(
            "No GPU found, and the report that needs none is made by the test tools, which are in "
            "a checkout of the repository and not in the installed package. Nothing was done."
        )
        return 2
    print("No GPU found: counting and compiling instead. Nothing here is a measurement of speed.")
    names = [cases, *(bench.name for bench in benches), *dtypes]
    counted, records = _count_and_compile(names, list(dict.fromkeys(gpu.target for gpu in gpus)))
    by_name = {bench.name: bench for bench in benches}
    common = {"kind": "predicted", "provider": "ours"} | rows.provenance(commit)
    found = [
        predict(row, by_name[row["op"]], [r for r in records if r.target == gpu.target], gpu)
        | common
        for gpu in gpus
        for row in counted
        if row["target"] == gpu.target
    ]
    file = out or rows.OUT / rows.PREDICTED
    rows.append(file, found)
    print(report(found), f"Rows: {file}", sep="\n")
    return 0


def _count_and_compile(names: Sequence[str], targets: list[str]) -> tuple[list[Row], list[Any]]:
    """The work of both subprocesses, at the same time, under a progress bar."""
    sys.path.insert(0, str(rows.ROOT))
    gate = importlib.import_module("tests.tools.compile_gate")
    steps = len(counting.named(names)) * len(targets) + 1
    with (
        ThreadPoolExecutor(1) as thread,
        tqdm(total=steps, unit="step", leave=False, disable=None) as bar,
    ):
        bar.set_description("starting")
        compiling = thread.submit(gate.run_gate, f"{_MODULE}:{','.join(names)}", targets, 1)
        counted = []
        for row in _counted([*names, *targets]):
            bar.set_description(f"counted {row['op']} {row['case']} {row['dtype']} {row['mode']}")
            bar.update()
            counted.append(row)
        bar.set_description(f"compiling for {', '.join(targets)}")
        while not compiling.done():
            bar.refresh()
            time.sleep(0.2)
        return counted, compiling.result()


def _counted(names: Sequence[str]) -> Iterator[Row]:
    """The rows that the first subprocess counts, as they come."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "KINETO_LOG_LEVEL": "99",  # the profiler counts the memory, and is chatty
        "PYTHONPATH": os.pathsep.join(filter(None, (str(rows.ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", _MODULE, *names]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(counting.ROW):
                yield json.loads(line.removeprefix(counting.ROW))
    if child.returncode:
        raise RuntimeError("counting traffic in the interpreter failed, as said above")


def predict(row: Row, bench: Bench, records: Sequence[Any], gpu: Gpu) -> Row:
    """A row with the machine code of its kernels for a GPU, and the time that they should take."""
    kernels = []
    parts = []
    precision = str(row.get("precision", row["dtype"]))
    tensor = precision != "fp32"  # else the kernels' products are among their instructions
    left: float = row.get("products", 0)  # of torch's kernels
    for name, (_, programs) in row["programs"].items():
        launches = [launch for launch in row["small_launches"] if launch["kernel"] == name]
        found = {id(r): r for launch in launches for r in records if _is_of(r, launch)}
        # Of several specialisations of one kernel the call runs each about as often.
        if not found:
            raise RuntimeError(f"no machine code of {name} is that of a launch in {row['case']}")
        work = bench.kernels[name]
        codes = [_code(r, work, gpu, row["sizes"]) for r in found.values()]
        elements, small = work.elements(row["sizes"]), row["small_elements"][name]
        growth = elements / small if small else 0.0
        fixed, in_small = (
            work.fixed(row[sizes], DTYPES[row["dtype"]].itemsize) for sizes in ("sizes", "small")
        )
        moved = fixed + growth * max(sum(launch["bytes"] for launch in launches) - in_small, 0)
        atomics = growth * sum(launch["atomics"] for launch in launches)
        products = work.products(row["sizes"])
        left -= products
        for code in codes:
            launch = model.Launch(
                programs=programs,
                num_warps=code["warps"],
                registers=code["registers"],
                shared=code["shared"],
                instructions=elements * code["per_element"] / len(codes),
                special=elements * code["special_per_element"] / len(codes),
                bytes=moved / len(codes),
                atomics=atomics / len(codes),
                products=products / len(codes) if tensor else 0.0,
                precision=precision,
            )
            seconds, limit = model.seconds(gpu, launch)
            parts.append((seconds, limit))
            kernels.append(code | {"us": round(seconds * 1e6, 3), "limit": limit})
    if left > 0:
        parts.append((left / gpu.matmul_flop_per_s(precision), "matrix products"))
    seconds, limit = model.call(parts, row["launches"] + bench.torch_kernels(row["sizes"]))
    roofs = {
        "copy_bytes_per_s": round(gpu.copy_bytes_per_s),
        "instructions_per_s": round(gpu.instructions_per_s),
    }
    if "products" in row:
        roofs[f"matmul_{precision}_flop_per_s"] = round(gpu.matmul_flop_per_s(precision))
    dropped = ("programs", "small_launches", "small_elements")
    return {k: v for k, v in row.items() if k not in dropped} | {
        "gpu": gpu.name,
        "target": gpu.target,
        "roofs": roofs,
        "predicted_us": round(seconds * 1e6, 3),
        "limit": limit,
        "kernels": kernels,
    }


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


def _code(record: Any, work: Work, gpu: Gpu, sizes: Mapping[str, int]) -> Row:
    """Of one kernel, what the report says.

    Per element: instructions of the innermost loop over the elements that a pass handles or, where
    the kernel has no loop, of the whole program over its elements; where it has one loop in
    another, of all of it, the inner one as often as a pass goes through it. Each instruction of
    each warp counts for all the warp's lanes. Branches are taken to run either side, once.
    """
    code = record.code
    lanes = record.num_warps * gpu.warp / work.block(record.constants)
    count: float = code.loop_instructions if work.loop else code.instructions
    special = (code.loop_counts if work.loop else code.counts).get("special", 0)
    if work.trips:
        count += code.loop_instructions * (work.trips(sizes, record.constants) - 1)
    return {
        "kernel": record.kernel,
        "constants": record.constants,
        "error": record.error.splitlines()[0] if record.error else "",
        "registers": code.registers,
        "stack": code.stack,
        "spilled": code.spilled,
        "shared": record.shared,
        "warps": record.num_warps,
        "occupancy": gpu.occupancy(code.registers, record.shared, record.num_warps),
        "per_element": count * lanes,
        "special_per_element": special * lanes,
    }


def report(found: Sequence[Row]) -> str:
    """Two tables for each GPU, a line per case and a line per kernel, and how to read them."""
    lines = ["PREDICTED, NOT YET MEASURED: bytes counted in Triton's interpreter, machine code"]
    for gpu in dict.fromkeys(row["gpu"] for row in found):
        mine = [row for row in found if row["gpu"] == gpu]
        lines += ["", f"{gpu} ({mine[0]['target']})", *_cases(mine), "", *_kernels(mine)]
    return "\n".join((*lines, "", _NOTES))


def _cases(found: Sequence[Row]) -> Iterator[str]:
    yield (
        f"{'op case dtype mode':44} {'compulsory':>12} {'ops/byte':>8} {'requested':>10} "
        f"{'sectors':>8} {'launches':>8} {'MB extra':>9} {'floor us':>9} {'predicted':>10}  limit"
    )
    for row in found:
        placed, memory = point(row), row["peak_memory"]
        floor_us = placed.floor * 1e6 if placed else 0.0
        yield (
            f"{row['op'] + ' ' + row['case'] + ' ' + row['dtype'] + ' ' + row['mode']:44} "
            f"{row['bytes'] / 1e6:9.2f} MB {row['operations'] / row['bytes']:8.2f} "
            f"{row['requested_bytes'] / row['small_bytes']:9.2f}x "
            f"{row['sector_bytes'] / row['small_bytes']:7.2f}x {row['launches']:8} "
            f"{'-' if memory is None else f'{memory / 1e6:.1f}':>9} {floor_us:9.1f} "
            f"{row['predicted_us']:10.1f}  {row['limit']}"
        )


def _kernels(found: Sequence[Row]) -> Iterator[str]:
    yield (
        f"{'kernel, and the first case that launches it':72} {'regs':>4} {'spill':>5} {'stack':>5} "
        f"{'shared':>6} {'warps':>5} {'occupancy':>9} {'instr/element':>13} {'special':>7}"
    )
    seen: set[str] = set()
    for row in found:
        for kernel in row["kernels"]:
            key = json.dumps([kernel["kernel"], kernel["constants"], row["dtype"]])
            if key in seen:
                continue
            seen.add(key)
            name = f"{kernel['kernel']}, {row['op']} {row['case']} {row['dtype']} {row['mode']}"
            if kernel["error"]:
                yield f"{name:72} NOT COMPILED: {kernel['error']}"
                continue
            yield (
                f"{name:72} {kernel['registers']:4} {kernel['spilled']:5} {kernel['stack']:5} "
                f"{kernel['shared']:6} {kernel['warps']:5} {kernel['occupancy']:9.0%} "
                f"{kernel['per_element']:13.1f} {kernel['special_per_element']:7.2f}"
            )


_NOTES = """\
compulsory   each input read once and each output written once, by any implementation
ops          fp32 instructions of the leanest known formulation; a fused multiply-add counts once,
             and products of matrices not at all
requested    bytes that active lanes ask for, caches or not, over the compulsory bytes; on a
             smaller problem, so where traffic does not grow in proportion (NMS) it differs
sectors      distinct 32-byte sectors touched, summed over launches, over the same
launches     of Triton kernels, per call; the prediction adds torch's own (sorting, summing)
MB extra     held at the worst moment beside the inputs, outputs included
floor        of the bytes at the speed of a copy, of the ops at the fp32 rate, or of products of
             matrices at that of tensor cores
predicted    perf/model.py says how, limit what takes most of it
spill, stack bytes per thread"""
