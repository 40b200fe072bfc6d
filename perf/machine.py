"""What the machine is and does: its name, its clocks under load, and its roofs beside the makers'.

What the makers say, in ``gpus``, is shown and never used for what was measured.
"""

from __future__ import annotations

import contextlib
import subprocess

import torch

from dlops_triton import _dispatch

from . import gpus
from .gpus import KIB, MIB, Gpu
from .probe import ROOFS
from .probe import roofs as roofs
from .rows import Row, said

_STATE = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}
_PATIENCE_S = 3.0  # with nvidia-smi, once what was watched is over


def gpu(device: torch.device) -> Row:
    """The part of a row that says where it was measured."""
    name, target = _dispatch.gpu(device)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"gpu": name, "driver": said(*query), "target": target}


class Watch:
    """Clocks, temperature and power while something runs: ``with Watch(device) as watch: ...``.

    nvidia-smi is started on entry and looks while the block runs; ``watch.row`` holds after it what
    was seen, None for each where there is no nvidia-smi or it does not know. Nothing is raised.
    """

    def __init__(self, device: torch.device):
        self.row: Row = dict.fromkeys(_STATE)
        self._device = device
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Watch:
        with contextlib.suppress(Exception):  # without what it sees, a measurement is still one
            # Its number may be another's here: CUDA can order and hide devices.
            uuid = torch.cuda.get_device_properties(self._device).uuid
            query = f"--query-gpu={','.join(_STATE.values())}"
            command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        with self._process as process, contextlib.suppress(Exception):
            try:
                text = process.communicate(timeout=_PATIENCE_S)[0]
            finally:
                process.kill()  # does nothing to one that has ended
            if process.returncode == 0:
                self.row = _state(text)


def _state(text: str) -> Row:
    """What nvidia-smi's line says; "[N/A]" and the like are None."""
    return dict(zip(_STATE, map(_number, text.strip().split(",")), strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def known(name: str) -> Gpu | None:
    """What the maker says of a GPU, by the name that its driver gives it."""
    return next((g for g in gpus.GPUS.values() if g.name == name), None)


def table(roofs: Row, known: Gpu | None) -> str:
    """Roofs, a line each, beside what the maker says where that is known."""
    lines = [
        f"{'roof':38} {'measured':>16}" + (f" {'datasheet':>16} {'share':>6}" if known else "")
    ]
    for name, roof in ROOFS.items():
        value: float | None = roofs.get(name)
        line = f"{roof.words:38} {'absent' if value is None else _shown(name, value):>16}"
        if known and roof.maker_says:
            says = roof.maker_says(known)
            line += f" {_shown(name, says):>16}"
            line += "" if value is None else f" {value / says:6.0%}"
        lines.append(line)
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    if name.endswith("_us"):
        return f"{value:.2f} us"
    units = {"bytes_per_s": "TB/s", "flop_per_s": "TFLOP/s", "instructions_per_s": "T/s"}
    unit = next(unit for suffix, unit in units.items() if name.endswith(suffix))
    return f"{value / 1e12:.2f} {unit}"


def datasheet() -> str:
    """What the makers say of the GPUs that are known here, as a table."""
    lines = [
        "The makers' numbers at boost clock, from datasheets. Nothing here was measured.",
        f"{'GPU':26} {'target':8} {'cores':>5} {'GHz':>5} {'TB/s':>6} {'fp32 T/s':>8} "
        f"{'special T/s':>11} {'L2 MiB':>6} {'shared KiB':>10} {'warps':>5}",
    ]
    for g in gpus.GPUS.values():
        special = g.cores * g.special * g.clock_hz
        lines.append(
            f"{g.name:26} {g.target:8} {g.cores:5} {g.clock_hz / 1e9:5.2f} "
            f"{g.dram_bytes_per_s / 1e12:6.2f} {g.instructions_per_s / 1e12:8.1f} "
            f"{special / 1e12:11.2f} {g.l2_bytes // MIB:6} {g.shared_bytes // KIB:10} "
            f"{g.warps:5}"
        )
    return "\n".join(lines)
