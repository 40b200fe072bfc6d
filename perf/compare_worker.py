"""One side of a comparison: this harness at work on the library of another folder.

    python perf/compare_worker.py LIBRARY_ROOT DEVICE

It is started by its path, because ``-m`` would import the library beside it. The library under
LIBRARY_ROOT brings its public functions, kernels and settings; cases, clocks and the reference that
answers are checked against are those of this folder, the same for both sides. Requests and replies
are lines of JSON: "prepare" a job, "sample" its clocks once each, be "done" with it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

CLOCKS = ("device", "eager")  # the first that there is counts: "device" on a GPU
_PERF = Path(__file__).resolve().parent


def load(library: Path) -> None:
    """Import the library of one folder, with ``perf`` and ``reference`` of another."""
    sys.path[0] = str(library)  # in place of the folder of this file
    package = importlib.import_module("dlops_triton")
    if not Path(package.__path__[0]).resolve().is_relative_to(library.resolve()):
        raise ImportError(f"{library} has no dlops_triton; {package.__path__[0]} was imported")
    for folder in (_PERF, _PERF.parent / "reference"):
        name = f"dlops_triton.{folder.name}"
        # What the library has imported it keeps; what is imported from now on comes from here.
        for known in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[known]
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        setattr(package, folder.name, module)
        spec.loader.exec_module(module)


class Side:
    """What answers the requests."""

    def __init__(self, device: str) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.bench: Any = importlib.import_module("dlops_triton.perf.bench")
        self.timing: Any = importlib.import_module("dlops_triton.perf.timing")
        self.device = self.torch.device(device)
        self.contender: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """A reply, which says under "refused" or "absent" why there is none.

        Raises:
            Exception: the device no longer works, so neither does this process.
        """
        ask = getattr(self, request.pop("ask"))
        try:
            return ask(**request)
        except Exception as e:  # whatever another commit does must not end the comparison
            known = isinstance(e, (self.bench.AbsentError, self.timing.RefusedError))
            words = str(e).strip() if known else f"{type(e).__name__}: {str(e).strip()}"
            self.timing.synchronize(self.device)
            self.done()
            return {"refused": words[:500]}

    def prepare(self, op: str, case: dict[str, Any], dtype: str, mode: str) -> dict[str, Any]:
        try:
            bench = self.bench.load(op)
        except ImportError as e:
            return {"absent": str(e)}
        self.contender = self.timing.contender(
            bench, "ours", self.bench.Case(**case), dtype, mode, self.device
        )
        return {"clocks": [clock for clock in CLOCKS if clock in self.contender.samplers]}

    def sample(self) -> dict[str, Any]:
        samplers = self.contender.samplers
        return {"seconds": {clock: samplers[clock]() for clock in CLOCKS if clock in samplers}}

    def done(self) -> dict[str, Any]:
        self.contender = None
        gc.collect()
        if self.device.type == "cuda":
            self.torch.cuda.empty_cache()
        return {}


def main(library: str, device: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    load(Path(library))
    side = Side(device)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(side.answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
