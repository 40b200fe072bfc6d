"""What the benchmarks write and draw: rows, command line, the report without a GPU, pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dlops_triton

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")
pytest.importorskip("matplotlib", reason="perf needs the extra 'perf'")

from dlops_triton.perf import OPS, bench, machine, roofline, rows, static, timing
from dlops_triton.perf import __main__ as cli
from dlops_triton.perf.bench import Bench, Case

# --- rows ------------------------------------------------------------------------------------


def measured_rows() -> list[rows.Row]:
    """Invented measurements of the real cases, on a machine that says so."""
    fixed = {
        "kind": "measured",
        "gpu": "Invented GPU",
        "driver": "1",
        "torch": "2",
        "triton": "3",
        "commit": "abc",
        "date": "2000-01-01T00:00",
        "roof_copy_bytes_per_s": 4.2e12,
        "roof_matmul_fp32_flop_per_s": 56e12,
    }
    rng = np.random.default_rng(0)
    found = []
    for known, case, dtype, mode in cli.jobs([bench.load(op) for op in OPS], tuple(bench.DTYPES)):
        size = known.bytes(case, mode, bench.DTYPES[dtype].itemsize)
        operations = known.operations(case, mode)
        least_us = max(size / 4.2e6, operations / 28e6) + 3
        for provider, factor in (("ours", 1.5), ("eager", 20), ("torchvision", 25)):
            found.append(
                fixed
                | {
                    "op": known.name,
                    "case": case.name,
                    "mode": mode,
                    "dtype": dtype,
                    "provider": provider,
                    "bytes": size,
                    "operations": operations,
                    "device_p50_us": least_us * factor * rng.uniform(0.8, 1.2),
                }
            )
    return found


def test_rows_round_trip_and_the_newest_counts(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "gpu.jsonl"
    first, second = measured_rows()[:2]
    rows.append(file, [first, second])
    newer = first | {"device_p50_us": 1.0}
    rows.append(file, [newer])
    assert len(file.read_text().splitlines()) == 3
    assert rows.read([file]) == [newer, second]


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", "run", "nms"])
    row = rows.provenance("0123")
    assert row["commit"] == "0123"
    assert row["command"] == "python -m dlops_triton.perf run nms"
    assert row["dlops_triton"] == dlops_triton.__version__
    assert rows.slug("NVIDIA H200 (141 GB)") == "nvidia-h200-141-gb"
    assert rows.said("no-such-command-anywhere") is None


# --- command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["plot", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)
    assert "usage: python -m dlops_triton.perf" in capsys.readouterr().out


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run", "fokal"]) == 2
    assert "no such op: fokal; there are focal, iou, nms" in capsys.readouterr().out
    assert static.run([bench.load("iou")], ["fp32"], target="sm_91") == 2
    assert "no such target: sm_91; there are sm_80," in capsys.readouterr().out


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with a GPU on which all measurements are invented; yields what was measured."""
    asked: list[str] = []

    def invented(known: Bench, case: Case, dtype: str, mode: str, *_: Any) -> list[rows.Row]:
        asked.append(f"{known.name} {case.name} {dtype} {mode}")
        if len(asked) == 3:
            raise KeyboardInterrupt
        invented = {"provider": "ours", "device_p50_us": 50.0, "eager_p50_us": 60.0}
        return [invented | {"launches": 1, "peak_memory": 0, "error": 0.0}]

    roofs = {f"roof_matmul_{dtype}_flop_per_s": 5e13 for dtype in ("bf16", "fp32")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "count_launches", lambda *_: None)
    monkeypatch.setattr(timing, "measure", invented)
    monkeypatch.setattr(machine, "gpu", lambda device: {"gpu": "Invented GPU", "driver": "1"})
    monkeypatch.setattr(machine, "roofs", lambda device: roofs | {"roof_copy_bytes_per_s": 4e12})
    return asked


def test_an_interrupted_run_keeps_what_it_measured(
    on_a_gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    assert cli.main(["run", "iou", "--dtype", "fp32", "--out", str(file), "--commit", "abc"]) == 0
    assert on_a_gpu[:2] == ["iou proposals-20k-1k fp32 fwd", "iou proposals-20k-1k fp32 fwd+bwd"]
    found = rows.read([file])
    assert [row["mode"] for row in found] == ["fwd", "fwd+bwd"]
    assert all(row["commit"] == "abc" and row["gpu"] == "Invented GPU" for row in found)
    printed = capsys.readouterr().out
    assert "Interrupted" in printed
    assert "iou proposals-20k-1k fp32 fwd+bwd" in printed


def test_a_spent_budget_ends_a_run(
    on_a_gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "nms", "--budget", "-1", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert not on_a_gpu
    assert "The budget is spent: 7 cases were not measured" in capsys.readouterr().out


def test_the_cases_of_real_networks_come_first() -> None:
    jobs = cli.jobs([bench.load("focal"), bench.load("nms")], ["fp32"])
    swept = [case in known.sweep for known, case, _, _ in jobs]
    assert swept == sorted(swept)
    assert {dtype for _, _, dtype, _ in jobs} == {"fp32"}


# --- without a GPU, and pictures --------------------------------------------------------------


@pytest.fixture(scope="module")
def static_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a whole static report, of the cheapest op and dtype."""
    file = tmp_path_factory.mktemp("static") / "static.jsonl"
    assert static.run([bench.load("focal")], ["bf16"], "sm_90", file, "abc") == 0
    return file


def test_the_static_report_joins_traffic_and_machine_code(static_file: Path) -> None:
    found = rows.read([static_file])
    assert [(row["case"], row["mode"]) for row in found[:2]] == [
        ("retinanet", "fwd"),
        ("retinanet", "fwd+bwd"),
    ]
    forward, both = found[:2]
    assert forward["kind"] == "static"
    assert (forward["launches"], both["launches"]) == (1, 2)
    # 512 rows of 80 logits in bf16, a label for each, a partial sum for each 1024 elements.
    assert forward["small_bytes"] == 512 * 80 * 2 + 512 * 8
    assert forward["sector_bytes"] - forward["small_bytes"] <= 512 * 80 // 1024 * 4 + 32
    assert forward["requested_bytes"] >= forward["small_bytes"]
    (kernel,) = forward["kernels"]
    assert kernel["kernel"] == "focal_fwd_kernel"
    assert kernel["constants"]["REDUCE"] is True
    assert kernel["registers"] > 0
    assert kernel["instructions"] > 0
    elements = kernel["constants"]["BLOCK"]
    assert kernel["per_element"] == kernel["instructions"] * kernel["warps"] * 32 / elements
    assert forward["instructions"] == kernel["per_element"] * 193_000 * 80
    assert len(both["kernels"]) == 2


def test_the_report_says_what_it_is_not(static_file: Path) -> None:
    report = static.report(rows.read([static_file]))
    assert report.startswith("NO GPU FOUND, NO SPEED MEASURED")
    assert "focal retinanet bf16 fwd+bwd" in report
    assert "focal_bwd_kernel, focal retinanet bf16 fwd+bwd" in report


def test_pictures_of_measurements(tmp_path: Path) -> None:
    found = [row for row in measured_rows() if row["op"] == "nms"]
    (drawn,) = roofline.draw(found, tmp_path)
    assert drawn == str(tmp_path / "roofline-invented-gpu-nms.png")
    assert Path(drawn).read_bytes().startswith(b"\x89PNG")


def test_predictions_are_pictures_of_their_own(static_file: Path, tmp_path: Path) -> None:
    results = tmp_path / "gpu.jsonl"
    rows.append(results, [row for row in measured_rows() if row["op"] == "focal"])
    out = tmp_path / "drawn"
    arguments = ["plot", str(results), str(static_file), "--out", str(out), "--format", "svg"]
    assert cli.main(arguments) == 0
    names = {file.name for file in out.iterdir()}
    assert names == {"roofline-invented-gpu-focal.svg", "predicted-sm-90-focal.svg"}


def test_where_there_is_no_model_there_is_no_prediction() -> None:
    row = {"kind": "static", "target": "sm_90", "instructions": None}
    assert roofline.point(row) is None
    assert roofline.point(row | {"target": "gfx942"}) is None


def test_shares_of_the_roof() -> None:
    row = measured_rows()[0] | {"bytes": 42_000, "operations": 1, "device_p50_us": 0.02}
    point = roofline.point(row)
    assert point is not None
    assert point.share == pytest.approx(0.5)  # 42 kB at 4.2 TB/s take 0.01 us
    compute_bound = roofline.point(row | {"operations": 560_000})
    assert compute_bound is not None
    assert compute_bound.share == pytest.approx(1)  # 0.56 M at 28 T/s: half of 56 TFLOP/s


def test_every_row_is_a_line_of_json(static_file: Path) -> None:
    for line in static_file.read_text().splitlines():
        row = json.loads(line)
        assert {"op", "case", "commit", "date", "command", "torch", "triton"} <= set(row)
