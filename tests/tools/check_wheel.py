"""Build the wheel, install it into an empty environment, and use it there: `make wheel`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib.util, pathlib, sys
import torch
import dlops_triton as d

d.nms, d.batched_nms, d.box_iou, d.sigmoid_focal_loss
for name in ("kernels", "reference", "perf", "tests"):
    assert importlib.util.find_spec(name) is None, f"the wheel puts {name} at top level"
assert pathlib.Path(d.__file__).is_relative_to(sys.prefix), d.__file__
boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]])
assert d.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1]
print(f"dlops_triton {d.__version__} from the wheel: {d.implementation('cpu')}")
"""


def main() -> None:
    """Fail with a message if the wheel is not as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder, "dist")
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = dist.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        tops = {name.split("/")[0] for name in names}
        assert {t for t in tops if not t.endswith(".dist-info")} == {"dlops_triton"}, tops
        for part in ("py.typed", "kernels/nms.py", "reference/nms.py", "perf/cli.py"):
            assert f"dlops_triton/{part}" in names, f"the wheel lacks {part}"
        environment = Path(folder, "environment")
        venv.create(environment, with_pip=True)
        python = str(environment / "bin" / "python")
        constraints = Path(sys.prefix, "constraints.txt")
        if not constraints.exists():
            constraints = ROOT / "constraints.txt"
        install = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints), str(wheel)]
        # Out of reach of the checkout, which would pass for the installed package.
        outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run(install, check=True, cwd=folder, env=outside)
        subprocess.run([python, "-c", PROGRAM], check=True, cwd=folder, env=outside)


if __name__ == "__main__":
    main()
