"""What a machine says of itself: nvidia-smi's reading, and the tables of its roofs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dlops_triton import _dispatch

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")

from dlops_triton.perf import gpus, machine, probe, rows

NOTHING = dict.fromkeys(("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w"))


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a script in nvidia-smi's place; where it writes its arguments is returned."""
    properties = SimpleNamespace(uuid="1234-5678")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def install(script: str) -> Path:
        file, arguments = tmp_path / "nvidia-smi", tmp_path / "arguments"
        file.write_text(f'#!/bin/sh\necho "$@" > {arguments}\n{script}\n')
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return arguments

    return install


def state(device: torch.device) -> rows.Row:
    with machine.Watch(device) as watch:
        pass
    return watch.row


def test_the_clocks_are_those_of_the_gpu_by_its_uuid(smi: Callable[[str], Path]) -> None:
    arguments = smi("echo '1980, 2619, 45, 312.45'")
    want = {"sm_clock_mhz": 1980, "memory_clock_mhz": 2619, "temperature_c": 45, "power_w": 312.45}
    assert state(torch.device("cuda", 1)) == want
    assert arguments.read_text().split() == [
        "--id=GPU-1234-5678",
        "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw",
        "--format=csv,noheader,nounits",
    ]


@pytest.mark.parametrize(
    ("script", "known"),
    [
        ("echo '1980, [N/A], 45, [Not Supported]'", {"sm_clock_mhz": 1980, "temperature_c": 45}),
        ("echo '[Unknown Error], [N/A], [N/A], N/A'", {}),
        ("echo 'No devices were found'", {}),
        ("echo", {}),
        ("echo '1, 2, 3, 4, 5'", {}),
        ("echo '1980, 2619, 45, 312.45'; exit 6", {}),
        (r"printf '\377'", {}),
    ],
)
def test_what_nvidia_smi_does_not_know_is_none(
    smi: Callable[[str], Path], script: str, known: dict[str, float]
) -> None:
    smi(script)
    assert state(torch.device("cuda")) == NOTHING | known


def test_without_nvidia_smi_or_without_a_gpu_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    properties = SimpleNamespace(uuid="1234")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        assert state(torch.device("cuda")) == NOTHING
    assert state(torch.device("cpu")) == NOTHING


def test_nvidia_smi_looks_while_the_watched_work_runs(
    smi: Callable[[str], Path], tmp_path: Path
) -> None:
    go, seen = tmp_path / "go", tmp_path / "seen"
    wait = f"for i in $(seq 500); do [ -e {go} ] && break; sleep 0.01; done"
    smi(f"{wait}; [ -e {go} ] && echo '1, 2, 3, 4'; touch {seen}")
    with machine.Watch(torch.device("cuda")) as watch:
        assert watch.row == NOTHING
        assert not seen.exists()  # the start did not wait for the end
        go.touch()
        deadline = time.monotonic() + 10
        while not seen.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen.exists()
    assert watch.row["power_w"] == 4


def test_a_watch_gives_up_an_nvidia_smi_that_hangs(
    smi: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("exec sleep 60")
    monkeypatch.setattr(machine, "_PATIENCE_S", 0.1)
    start = time.monotonic()
    with machine.Watch(torch.device("cuda")) as watch:
        process = watch._process
    assert time.monotonic() - start < 30
    assert watch.row == NOTHING
    assert isinstance(process, subprocess.Popen)
    assert process.poll() is not None


def test_a_watch_hides_no_error_of_the_work_and_leaves_no_process(
    smi: Callable[[str], Path],
) -> None:
    smi("echo '1, 2, 3, 4'")
    watch = machine.Watch(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert watch._process is not None
    assert watch._process.poll() is not None


def test_a_gpu_is_named_with_its_driver_and_target(
    smi: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("echo 590.10; echo 590.10")  # a line per GPU
    monkeypatch.setattr(_dispatch, "gpu", lambda device: ("Invented GPU", "sm_90"))
    want = {"gpu": "Invented GPU", "driver": "590.10", "target": "sm_90"}
    assert machine.gpu(torch.device("cuda")) == want


# --- tables ----------------------------------------------------------------------------------


def test_the_table_sets_measured_roofs_beside_the_makers_numbers() -> None:
    known = machine.known("NVIDIA H200")
    assert known is gpus.H200
    roofs = {
        "copy_bytes_per_s": 0.5 * known.dram_bytes_per_s,
        "instructions_per_s": 0.25 * known.instructions_per_s,
        "matmul_bf16_flop_per_s": 788e12,
        "launch_us": 4.321,
    }
    lines = machine.table(roofs, known).splitlines()
    assert len(lines) == 1 + len(probe.ROOFS)
    by_name = dict(zip(probe.ROOFS, (line.split() for line in lines[1:]), strict=True))
    assert by_name["copy_bytes_per_s"][-5:] == ["2.40", "TB/s", "4.80", "TB/s", "50%"]
    assert by_name["triad_bytes_per_s"][-3:] == ["absent", "4.80", "TB/s"]
    assert by_name["instructions_per_s"][-1] == "25%"
    assert by_name["matmul_bf16_flop_per_s"][-5:-3] == ["788.00", "TFLOP/s"]
    assert by_name["matmul_bf16_flop_per_s"][-3:] == ["989.40", "TFLOP/s", "80%"]
    assert by_name["launch_us"][-2:] == ["4.32", "us"]


def test_a_gpu_that_no_datasheet_is_known_of_is_set_beside_none() -> None:
    assert machine.known("Invented GPU") is None
    text = machine.table({"copy_bytes_per_s": 1e12}, None)
    assert "datasheet" not in text
    assert text.splitlines()[1].split()[-2:] == ["1.00", "TB/s"]


def test_the_datasheets_are_said_to_be_the_makers() -> None:
    title, header, *lines = machine.datasheet().splitlines()
    assert "makers" in title
    assert "Nothing here was measured" in title
    assert [line[:26].rstrip() for line in lines] == [g.name for g in gpus.GPUS.values()]
    assert {len(line) for line in lines} == {len(header)}
    assert lines[0][26:].split() == [
        "sm_90", "132", "1.98", "4.80", "33.5", "4.18", "60", "228", "64"
    ]  # fmt: skip
