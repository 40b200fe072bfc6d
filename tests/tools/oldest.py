"""Compile every kernel with the oldest Triton that pyproject.toml admits: `make oldest`.

That Triton is laid beside this environment, not into it, and shadows its own; torch stays.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .compile_gate import load

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_90", "gfx942")  # one of each maker: what an older Triton refuses, it refuses early


def minimum(name: str) -> str:
    """The oldest version of a dependency, as pyproject.toml has it."""
    (found,) = re.findall(rf'"{name}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return str(found)


def main() -> int:
    """Compile, and return 1 if a kernel was refused."""
    version, begin = minimum("triton"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        paths = (folder, str(ROOT), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        ask = [sys.executable, "-c", "import triton; print(triton.__version__)"]
        found = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True)
        if found.stdout.split(".")[:2] != version.split(".")[:2]:
            print(f"Triton {version} was installed, and {found.stdout.strip()} imported.")
            return 1
        file = Path(folder, "records.jsonl")
        gate = [sys.executable, "-m", "tests.tools.compile_gate", "--json", str(file)]
        gate += ["--targets", ",".join(TARGETS), "--processes", str(os.cpu_count() or 2)]
        subprocess.run(gate, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        records = load(file)
    refused = [f"{record}: {record.error}" for record in records if record.error]
    compiled = Counter(record.target for record in records if not record.error)
    print("\n".join(refused))
    print(
        f"Triton {found.stdout.strip()} compiled {dict(compiled)} kernels and settings, and "
        f"refused {len(refused)}, in {time.monotonic() - begin:.0f} s."
    )
    return 1 if refused or set(compiled) != set(TARGETS) else 0


if __name__ == "__main__":
    sys.exit(main())
