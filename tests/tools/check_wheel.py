"""Build what is published, and use it as a stranger would: `make wheel`.

The wheel of the checkout, the sdist, and the wheel that the sdist gives, which must be the same;
what an index makes of them; then the wheel in an empty environment, where it checks itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dlops_triton"
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
    """Fail with a message if a distribution is not as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        wheel, sdist = build(ROOT, here / "dist", "wheel"), build(ROOT, here / "dist", "sdist")
        run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])
        check_names(wheel)
        check_description(wheel)
        with tarfile.open(sdist) as archive:
            archive.extractall(here / "source", filter="data")
        (source,) = (here / "source").iterdir()
        check_same(wheel, build(source, here / "again", "wheel"))
        use(wheel, here)


def build(source: Path, out: Path, kind: str) -> Path:
    """Build a wheel or an sdist."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source)]
    run(command, stdout=subprocess.DEVNULL)
    (found,) = out.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind])
    return found


def check_names(wheel: Path) -> None:
    """All modules of the checkout, through its links, and nothing beside them."""
    names = set(contents(wheel))
    wanted = {"dlops_triton/py.typed"}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for name in files:
            path = Path(folder, name).relative_to(ROOT)
            tuned = path.parent.name == "tuned" and path.suffix == ".json"
            if path.suffix == ".py" or tuned:
                wanted.add(path.as_posix())
    found = {name for name in names if ".dist-info/" not in name}
    assert found == wanted, f"the wheel lacks {wanted - found} and should not have {found - wanted}"


def check_description(wheel: Path) -> None:
    """What an index shows has no link that leads nowhere there."""
    (metadata,) = (text for name, text in contents(wheel).items() if name.endswith("/METADATA"))
    text = metadata.decode()
    relative = re.findall(r"\]\((?!https?://|#)[^)]*\)", re.sub(r"```.*?```", "", text, flags=re.S))
    assert not relative, f"links of the README that lead nowhere on an index: {relative}"
    assert "## The ops" in text


def check_same(wheel: Path, other: Path) -> None:
    """Two wheels hold the same, byte for byte."""
    ours, theirs = contents(wheel), contents(other)
    different = {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}
    # The record lists the others with their sizes; it differs if and only if they do.
    assert not different, f"the sdist gives another wheel: {sorted(different)}"
    print(f"{wheel.name}: {len(ours)} files, and the same from the sdist")


def use(wheel: Path, folder: Path) -> None:
    """Install the wheel into an empty environment, and run it there."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    constraints = Path(sys.prefix, "constraints.txt")
    if not constraints.exists():
        constraints = ROOT / "constraints.txt"
    # Out of reach of the checkout, which would pass for the installed package.
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints), str(wheel)]
    for command in (
        install,
        [python, "-c", PROGRAM],
        [python, "-m", "dlops_triton", "check"],
    ):
        run(command, cwd=folder, env=outside)


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def run(command: Sequence[str], **options: object) -> None:
    subprocess.run(command, check=True, **options)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
