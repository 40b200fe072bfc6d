"""The process in which ``python -m dlops_triton check`` runs ops.

Arguments: the device, dtypes and names of ops, each separated by commas. Says "ready" and then what
became of each op, a JSON object on a line. The interpreter and the compiler exclude each other in
a process, and a process that a fault of a GPU ends is not the one that the user started.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
import triton

from . import _dispatch
from ._check_cases import CASES, Maker, Output

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The one table of tolerances, which the tests use as well.
# Relative error of one elementwise result: one rounding in the halves, and in fp32 what a GPU's
# approximate exp, log and division leave.
RTOL = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

# Results this small are denormal: rounded to a fixed step, or flushed to zero.
SMALLEST = {
    torch.float64: 2.3e-308,
    torch.float32: 1.2e-38,
    torch.float16: 6e-8,
    torch.bfloat16: 1.2e-38,
}

Json = dict[str, Any]


def compare(output: Output, dtype: torch.dtype) -> Json:
    """How far a result is from the reference, where that is most of what is accepted.

    Accepted is the rounding of the result, and that of the arithmetic, or of its terms, beside the
    largest result; of an exact one nothing.

    Returns:
        "what"; "difference" and "accepted", at the worst place, or None where the difference is no
        number; "problem", in words, or "".
    """
    got = output.got.detach().cpu().double().numpy()
    want = np.asarray(output.want, np.float64)
    found: Json = {"what": output.what, "difference": 0.0, "accepted": 0.0, "problem": ""}
    if got.shape != want.shape:
        found["difference"] = None
        found["problem"] = f"shape {list(got.shape)}, expected {list(want.shape)}"
        return found
    if not got.size:
        return found
    accepted = np.zeros(want.shape)
    if not output.exact:
        own = output.got.dtype
        terms = dtype if output.rounded else torch.float32
        accepted += SMALLEST[own] + RTOL[own] * np.abs(want) + RTOL[terms] * np.abs(want).max()
    with np.errstate(invalid="ignore"):
        difference = np.where(got == want, 0.0, np.abs(got - want))
        wrong = ~(difference <= accepted)
        # The worst: of those that are accepted, the one with the least to spare.
        share = difference / np.maximum(accepted, np.finfo(np.float64).tiny)
    rank = np.where(wrong, np.nan_to_num(difference, nan=np.inf), -1.0) if wrong.any() else share
    at = np.unravel_index(np.argmax(rank), got.shape)
    if wrong.any():
        found["problem"] = (
            f"{wrong.sum()} of {wrong.size} differ, most of all {[int(i) for i in at]}: "
            f"{got[at]:.6g}, expected {want[at]:.6g}"
        )
    found["difference"] = float(difference[at]) if np.isfinite(difference[at]) else None
    found["accepted"] = float(accepted[at])
    return found


def run(op: str, device: torch.device, dtype: torch.dtype) -> Json:
    """Call one op, forward and backward; what it raises is part of what is returned."""
    begin = time.perf_counter()
    many = not _dispatch.INTERPRETED
    found: Json = {"outputs": [], "error": ""}
    try:
        for output in CASES[op](Maker(device, dtype, many)):
            found["outputs"].append(compare(output, dtype))
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        found["error"] = f"{type(error).__name__}: {first}"
    found["seconds"] = time.perf_counter() - begin
    return found


def mend_interpreter() -> None:
    """Triton 3.6 counts loops by arrays of one element, which numpy of late takes for no number."""
    from triton.runtime import interpreter

    stock = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def main() -> None:
    device, dtypes, ops = sys.argv[1:]
    if _dispatch.INTERPRETED and triton.__version__.startswith("3.6."):
        mend_interpreter()
    # What else prints, on whatever occasion, prints elsewhere.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        warnings.simplefilter("ignore")
        print(json.dumps({"ready": True}), file=out, flush=True)
        for op in ops.split(","):
            found = {
                name: run(op, torch.device(device), DTYPES[name]) for name in dtypes.split(",")
            }
            print(json.dumps({"op": op, "dtypes": found}), file=out, flush=True)


if __name__ == "__main__":
    main()
