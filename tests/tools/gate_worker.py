"""A subprocess of the compile gate: python -m tests.tools.gate_worker CASES TARGETS I/N FILE AFTER.

Compiles every Nth specialisation, numbered as they first appear, from number AFTER + 1 on. Each
gets a line in FILE before it is compiled, marked as failed, and another after: so a compiler that
ends the process leaves its mark.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from dlops_triton import _dispatch

from .compile_gate import CASE_RAISED, DIED, TARGETS, Record
from .machine_code import from_amdgcn, from_cubin


class _Offline:
    """The driver of a GPU that is not here.

    Triton keeps compiled kernels by device, so each target is a device of its own.
    """

    def __init__(self, name: str):
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*TARGETS[self._name])

    def get_current_device(self) -> str:
        return self._name

    def get_current_stream(self, device: str) -> int:
        return 0


class _Gate:
    """Stands in for `_dispatch.launch`, and compiles this worker's share."""

    def __init__(self, is_mine: Callable[[int], bool], file: Path):
        self._is_mine = is_mine
        self._file = file
        self._log = file.with_suffix(".log")
        self._seen: set[tuple[str, str]] = set()
        self._started: Record | None = None
        self._case = self._target = ""

    def run(self, cases: Iterable[tuple[str, Callable[[], Any]]], targets: Iterable[str]) -> None:
        cases = list(cases)
        _dispatch.launch = self._launch
        _dispatch.cpu_implementation = "kernel"
        _dispatch.gpu = lambda device: ("", self._target)  # which has its own launch settings
        triton.knobs.runtime.jit_cache_hook = self._start
        for self._target in targets:
            driver.set_active(_Offline(self._target))
            for self._case, thunk in cases:
                thunk()

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        self._started = None
        log_length = self._log.stat().st_size
        begin = time.perf_counter()
        try:
            compiled = kernel.warmup(*args, grid=grid, **settings)
        except Exception as error:
            if self._started is None:
                raise  # a launch that no target takes, not a kernel that one refuses
            self._started.error = f"{type(error).__name__}: {error}"
            self._write(self._started)
            return
        if (record := self._started) is None:
            return
        record.seconds = round(time.perf_counter() - begin, 3)
        record.shared = compiled.metadata.shared
        record.ptx = compiled.asm.get("ptx", "")
        cubin = compiled.asm.get("cubin")
        record.code = from_cubin(cubin) if cubin else from_amdgcn(compiled.asm["amdgcn"])
        # LLVM may report an error and still deliver a kernel, without the statement at fault.
        said = self._log.read_bytes()[log_length:].decode(errors="replace")
        record.error = "\n".join(re.findall(r"^.*\berror: .*$", said, re.MULTILINE))
        if record.error:  # from the cache it would come without a word
            shutil.rmtree(get_cache_manager(compiled.hash).cache_dir)
        self._write(record)

    def _start(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before a compilation; True cancels it."""
        job = (f"{fn.module}.{fn.name}:{key}", self._target)
        if job in self._seen:
            return True
        self._seen.add(job)
        if not self._is_mine(len(self._seen)):
            return True
        names = fn.jit_function.arg_names
        attributes = compile["configs"][0]
        self._started = Record(
            case=self._case,
            kernel=fn.name,
            target=self._target,
            constants={
                _element(names[path[0]], path): _plain(v)
                for path, v in compile["constants"].items()
            },
            arguments={
                _element(name, path): " ".join(
                    (kind, *(f"{a[0]}={a[1]}" for a in attributes.get(path, ())))
                )
                for i, (name, kinds) in enumerate(compile["signature"].items())
                for path, kind in _elements(kinds, (i,))
                if kind != "constexpr"
            },
            num_warps=compile["num_warps"],
            error=DIED,
        )
        self._write(self._started)
        return False

    def _write(self, record: Record) -> None:
        with self._file.open("a") as out:
            out.write(json.dumps({"job": len(self._seen)} | asdict(record)) + "\n")


def _elements(kinds: Any, path: tuple[int, ...]) -> Iterable[tuple[tuple[int, ...], str]]:
    """The types of an argument, which may be a tuple, by where they stand."""
    if isinstance(kinds, str):
        yield path, kinds
    else:
        for i, kind in enumerate(kinds):
            yield from _elements(kind, (*path, i))


def _element(name: str, path: tuple[int, ...]) -> str:
    return name + "".join(f"[{i}]" for i in path[1:])


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def main() -> None:
    cases, targets, share, path, after = sys.argv[1:]
    worker, workers = map(int, share.split("/"))
    module, name = cases.split(":")
    gate = _Gate(lambda job: job > int(after) and job % workers == worker, Path(path))
    try:
        gate.run(getattr(importlib.import_module(module), name), targets.split(","))
    except Exception:
        traceback.print_exc()
        sys.exit(CASE_RAISED)


if __name__ == "__main__":
    main()
