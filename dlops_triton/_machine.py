"""What this machine is, in words, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from . import __version__, _dispatch, _installation
from .perf.rows import said


def machine() -> dict[str, Any]:
    """Versions, GPUs, drivers, what runs what, and notes on what is amiss; all of it JSON."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())] if available else []
    return {
        "dlops_triton": __version__,
        "installed": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _driver(),
        "cpu_tensors": _dispatch.implementation("cpu"),
        "gpu_tensors": _dispatch.implementation("cuda") if gpus else None,
        "gpus": gpus,
        "notes": notes(gpus, [str(w.message).splitlines()[0] for w in warned]),
    }


def _gpu(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    name, target = _dispatch.gpu(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    return {"name": name, "target": target, "memory_gib": round(memory / 2**30, 1)}


def notes(gpus: list[dict[str, Any]], warned: list[str]) -> list[str]:
    """What a user should know before anything else, a line each."""
    found = []
    versions = {"torch": torch.__version__, "triton": triton.__version__, "numpy": np.__version__}
    for name, least in _installation.minimum().items():
        if name in versions and _installation.older(versions[name], least):
            found.append(f"{name} {versions[name]} is older than {least}, the oldest supported.")
    if not gpus and (there := _visible_gpu()):
        found.append(f"{there}, but torch sees no GPU. {_why_not()}")
        found += [f"torch says: {line}" for line in warned]
    for gpu in gpus:
        major = gpu["target"].removeprefix("sm_")[:-1]
        if gpu["target"].startswith("sm_") and int(major) < 8:
            found.append(
                f"{gpu['name']} is {gpu['target']}; the kernels are compiled and tested for "
                "sm_80 and later."
            )
    if _dispatch.INTERPRETED:
        found.append(
            "TRITON_INTERPRET is set: outside this check every op runs in Triton's interpreter, "
            "which is for debugging, and slow."
        )
    return found


def _visible_gpu() -> str:
    """A GPU that the system knows of, whatever torch says; empty if there is none."""
    if name := said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"):
        return f"nvidia-smi lists {name}"
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "There is an NVIDIA GPU in /dev"
    if Path("/dev/kfd").exists():
        return "There is an AMD GPU in /dev"
    return ""


def _why_not() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA and ROCm: install a build for the "
            "GPU, as pytorch.org says."
        )
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if os.environ.get(name) in ("", "-1"):
            return f"{name} hides it."
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"torch is built for {build}: the driver may be too old for it, or of another maker."


def _driver() -> str | None:
    nvidia = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    amd = Path("/sys/module/amdgpu/version")
    return nvidia or (amd.read_text().strip() if amd.exists() else None)


def header(m: dict[str, Any]) -> str:
    """The machine as aligned lines."""
    build = f"CUDA {m['cuda']}" if m["cuda"] else f"ROCm {m['hip']}" if m["hip"] else "CPU only"
    lines = [
        ("dlops_triton", f"{m['dlops_triton']} in {m['installed']}"),
        ("Python", f"{m['python']} ({sys.executable})"),
        ("torch", f"{m['torch']}, built for {build}"),
        ("Triton", f"{m['triton']}, numpy {m['numpy']}"),
        ("platform", m["platform"]),
        ("driver", m["driver"] or "no GPU driver found"),
    ]
    lines += [
        (f"GPU {i}", f"{g['name']}, {g['target']}, {g['memory_gib']} GiB")
        for i, g in enumerate(m["gpus"])
    ]
    if not m["gpus"]:
        lines.append(("GPU", "none that torch sees"))
    lines += [
        ("GPU tensors", m["gpu_tensors"] or "run nowhere here"),
        ("CPU tensors", m["cpu_tensors"]),
        *(("note", line) for line in m["notes"]),
    ]
    return "\n".join(wrapped(f"{name:<13} {value}", 14) for name, value in lines)


def wrapped(text: str, indent: int) -> str:
    """In lines of at most 100 characters, but for words longer than that."""
    return textwrap.fill(
        text,
        100,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
