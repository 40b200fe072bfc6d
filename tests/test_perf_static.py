"""What the lab says without a GPU: counted traffic, machine code, and times predicted from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")

from dlops_triton import _dispatch
from dlops_triton.perf import bench, counting, model, rows, static
from dlops_triton.perf.gpus import A100, GPUS, H100, H200, KIB, MI300X, RTX_4090, Gpu
from tests.fakes import squaring
from tests.tools.compile_gate import TARGETS, Record
from tests.tools.machine_code import MachineCode

# --- GPUs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "resident"),
    [
        (H200, 32, 0, 4, 16),  # as many warps as there may be
        (H200, 33, 0, 4, 12),  # rounded up to 40 registers
        (H200, 128, 0, 4, 4),
        (H200, 255, 0, 8, 1),
        (H200, 16, 100 * KIB, 4, 2),  # shared memory, and what is reserved of it
        (H200, 16, 113 * KIB, 4, 2),
        (H200, 16, 114 * KIB, 4, 1),
        (H200, 16, 0, 1, 32),  # as many programs as there may be
        (A100, 16, 100 * KIB, 4, 1),
        (RTX_4090, 32, 0, 4, 12),
        (MI300X, 128, 0, 4, 4),
        (MI300X, 64, 0, 4, 8),
        (MI300X, 16, 40 * KIB, 4, 1),
        (H200, 16, 300 * KIB, 4, 0),
    ],
)
def test_programs_that_a_core_holds(
    gpu: Gpu, registers: int, shared: int, warps: int, resident: int
) -> None:
    assert gpu.resident(registers, shared, warps) == resident
    assert gpu.occupancy(registers, shared, warps) == resident * warps / gpu.warps


def test_rates_are_the_makers() -> None:
    """TFLOP/s in fp32, a fused multiply-add counting twice, as their datasheets have them."""
    stated = {"H200": 67, "H100": 67, "A100": 19.5, "4090": 82.6, "MI300X": 163.4 / 2}
    for name, gpu in GPUS.items():
        assert 2 * gpu.instructions_per_s / 1e12 == pytest.approx(stated[name], rel=0.01)
        assert gpu.copy_bytes_per_s < gpu.dram_bytes_per_s
        assert TARGETS[gpu.target][2] == gpu.warp
    tensor = {"H200": 989, "H100": 989, "A100": 312, "4090": 165.2, "MI300X": 1307.4}
    for name, gpu in GPUS.items():
        assert gpu.matmul_flop_per_s("fp16") / 1e12 == pytest.approx(tensor[name], rel=0.01)
        assert gpu.matmul_flop_per_s("tf32") / 1e12 == pytest.approx(tensor[name] / 2, rel=0.01)
        assert gpu.matmul_flop_per_s("fp32") == 2 * gpu.instructions_per_s


# --- the model -------------------------------------------------------------------------------

# On every core as many programs, which fill it.
FULL = model.Launch(
    programs=132 * 64,
    num_warps=4,
    registers=32,
    shared=0,
    instructions=1e9,
    special=0,
    bytes=0,
)


def of(launch: model.Launch, **changes: float) -> tuple[float, str]:
    return model.seconds(H200, dataclasses.replace(launch, **changes))  # type: ignore[arg-type]


def test_a_kernel_takes_as_long_as_the_slowest_of_what_it_does() -> None:
    issue = 132 * 128 * 1.98e9
    assert of(FULL) == (pytest.approx(1e9 / issue), "instructions")
    assert of(FULL, special=2e8) == (pytest.approx(2e8 / issue * 8), "special functions")
    assert of(FULL, bytes=4.32e9) == (pytest.approx(1e-3), "bytes")
    assert of(FULL, atomics=64e6 * 132) == (pytest.approx(1e6 / 1.98e9), "atomics")
    tensor = {"products": 989.4e9}
    assert of(FULL, **tensor) == (pytest.approx(1e-3), "matrix products")
    assert of(FULL, **tensor, precision="tf32")[0] == pytest.approx(2e-3)  # type: ignore[arg-type]
    assert of(FULL, **tensor, programs=66)[0] == pytest.approx(2e-3)


def test_programs_that_do_not_fill_the_gpu_take_longer() -> None:
    full, _ = of(FULL)
    assert of(FULL, programs=133 * 64)[0] > full  # a last round of 64 programs
    assert of(FULL, programs=66, num_warps=8)[0] == pytest.approx(2 * full)  # half of the cores
    assert of(FULL, programs=132, num_warps=8)[0] == pytest.approx(full)
    assert of(FULL, programs=132, num_warps=4)[0] == pytest.approx(2 * full)  # too few warps
    # One program has the bandwidth of a core.
    assert of(FULL, programs=1, bytes=1e9)[0] == pytest.approx(1e9 / 64 / 1.98e9)


def test_a_call_adds_its_kernels_and_the_gaps_before_them() -> None:
    parts = [(3e-6, "bytes"), (4e-6, "instructions"), (2e-6, "bytes")]
    assert model.call(parts, 1) == (pytest.approx(11e-6), "bytes")
    assert model.call(parts, 10) == (pytest.approx(29e-6), "launches")


# --- counting --------------------------------------------------------------------------------


def test_memory_at_the_worst_moment() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(1_000_000, dtype=torch.int8)
        b = torch.empty(500_000, dtype=torch.int8)
        del a
        return torch.empty(2_000_000, dtype=torch.int8) if b.numel() else b

    assert counting._peak_memory(call) == 2_500_000


def test_an_outline_finds_launches_programs_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "cpu_implementation", "kernel")
    known = bench.load("nms")
    case = next(c for c in known.sweep if c.sizes["n"] == 64_000)
    found = counting._outline(known, case, "fp32", "fwd")
    width = 3072
    bands = [width] * 20 + [64_000 - 20 * width]
    programs = {name: times for name, (times, _) in found["programs"].items()}
    assert programs == {"nms_mask_kernel": 21, "nms_resolve_kernel": 21, "nms_suppress_kernel": 20}
    assert found["launches"] == 62
    masks = sum(-(-size // 1024) * -(-size // 32) for size in bands)
    assert found["programs"]["nms_mask_kernel"][1] == masks / 21
    assert found["programs"]["nms_resolve_kernel"][1] == 1
    assert width**2 / 8 < found["peak_memory"] < 64 * 64_000


def test_cases_for_the_compiler_are_named_by_an_attribute() -> None:
    cases = getattr(counting, "small,nms,fp32")
    assert [name for name, _ in cases] == [
        "nms 128-keep-16 fp32 fwd",
        "nms 512-keep-64 fp32 fwd",
    ]
    for name in ("small,nms", "nms,fp32", "small,fp32", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(counting, name)


# --- the report ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a whole report, of the cheapest op and dtype, for two GPUs."""
    out = tmp_path_factory.mktemp("static") / "predicted.jsonl"
    benches = [bench.load("focal")]
    assert static.run(benches, ["bf16"], "small", [H200, H100, MI300X], out, "abc") == 0
    return out


def test_the_report_joins_traffic_and_machine_code(file: Path) -> None:
    found = rows.read([file])
    assert len(found) == 3 * 3 * 2  # GPUs, cases, modes
    forward, both = (row for row in found[:2])
    assert (forward["case"], forward["mode"], both["mode"]) == ("1024x80", "fwd", "fwd+bwd")
    assert {row["kind"] for row in found} == {"predicted"}
    assert {row["gpu"] for row in found} == {H200.name, H100.name, MI300X.name}
    assert (forward["launches"], both["launches"]) == (1, 2)
    # 512 rows of 80 logits in bf16, a label for each; the programs' sums, their count, the loss.
    assert forward["small_bytes"] == 512 * 80 * 2 + 512 * 8
    assert 0 < forward["sector_bytes"] - forward["small_bytes"] <= 2 * 40 * 4 + 6 * 32
    assert forward["requested_bytes"] >= forward["small_bytes"]
    (kernel,) = forward["kernels"]
    assert kernel["kernel"] == "focal_rows_kernel"
    assert kernel["constants"]["dx_ptr"] is None
    assert kernel["registers"] > 0
    assert kernel["occupancy"] == H200.occupancy(kernel["registers"], kernel["shared"], 1)
    assert 16 < kernel["per_element"] < 18  # of the loop
    assert kernel["special_per_element"] == 2
    assert len(both["kernels"]) == 2
    gaps = both["launches"] * model.GAP_S * 1e6  # torch launches nothing here
    assert both["predicted_us"] == pytest.approx(gaps + sum(k["us"] for k in both["kernels"]), 1e-3)
    # The backward writes a gradient of the size of the logits.
    assert both["peak_memory"] >= 1024 * 80 * 2 > forward["peak_memory"]
    assert forward["roofs"] == {
        "copy_bytes_per_s": round(H200.copy_bytes_per_s),
        "instructions_per_s": round(H200.instructions_per_s),
    }


def test_what_is_counted_in_small_is_scaled_by_the_elements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[model.Launch] = []
    monkeypatch.setattr(model, "seconds", lambda gpu, launch: (seen.append(launch), (1e-6, "x"))[1])
    work = bench.Work(elements=lambda sizes: sizes["n"], block=lambda constants: 64)
    code = MachineCode(registers=32, instructions=100, counts={"special": 4})
    record = Record("case", "k", "sm_90", {"BLOCK": 64}, {}, num_warps=2, code=code)
    launch = {"kernel": "k", "arguments": {}, "constants": {"BLOCK": 64}, "bytes": 50, "atomics": 6}
    row = {
        "dtype": "bf16",
        "sizes": {"n": 1000},
        "small": {"n": 10},
        "launches": 2,
        "programs": {"k": [2, 7]},
        "small_elements": {"k": 10},
        "small_launches": [launch, launch],
    }
    known = squaring({}, kernels={"k": work})
    found = static.predict(row, known, [record], H200)
    (asked,) = seen
    assert asked.bytes == 2 * 50 * 1000 / 10
    assert asked.atomics == 2 * 6 * 1000 / 10
    assert asked.products == 0
    assert asked.instructions == 1000 * 100  # of 2 warps, over 64 elements
    assert asked.special == 1000 * 4
    assert (asked.programs, asked.num_warps) == (7, 2)
    assert found["predicted_us"] == pytest.approx(1 + 2 * model.GAP_S * 1e6)
    assert not {"programs", "small_launches", "small_elements"} & set(found)


def test_a_loop_in_a_loop_and_products_by_tensor_cores_and_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[model.Launch] = []
    monkeypatch.setattr(model, "seconds", lambda gpu, launch: (seen.append(launch), (1e-6, "x"))[1])
    work = bench.Work(
        elements=lambda sizes: sizes["n"],
        block=lambda constants: 64,
        trips=lambda sizes, constants: sizes["m"] / constants["BLOCK"],
        products=lambda sizes: 2 * sizes["n"] * sizes["m"],
        fixed=lambda sizes, itemsize: itemsize * sizes["m"],
    )
    code = MachineCode(registers=32, instructions=100, loop_instructions=30)
    record = Record("case", "k", "sm_90", {"BLOCK": 16}, {"s[0]": "i32"}, num_warps=2, code=code)
    launch = {"kernel": "k", "arguments": {"s[0]": "i32"}, "constants": {"BLOCK": 16}}
    row = {
        "dtype": "bf16",
        "precision": "bf16",
        "products": 5 * 1000 * 64,  # so that torch multiplies too
        "sizes": {"n": 1000, "m": 64},
        "small": {"n": 10, "m": 64},
        "launches": 1,
        "programs": {"k": [1, 7]},
        "small_elements": {"k": 10},
        "small_launches": [launch | {"bytes": 178, "atomics": 0}],
    }
    known = squaring({}, kernels={"k": work})
    found = static.predict(row, known, [record], H200)
    (asked,) = seen
    assert asked.instructions == 1000 * (70 + 4 * 30)  # of 2 warps, over 64 elements
    assert asked.bytes == 2 * 64 + 50 * 1000 / 10
    assert (asked.products, asked.precision) == (2 * 1000 * 64, "bf16")
    by_torch = 3 * 1000 * 64 / H200.tensor_flop_per_s
    assert found["predicted_us"] == pytest.approx(1 + 1e6 * (by_torch + model.GAP_S), abs=1e-3)
    assert found["roofs"]["matmul_bf16_flop_per_s"] == H200.tensor_flop_per_s
    # In fp32 proper the kernel's are among its instructions, and torch is slower.
    slower = static.predict(row | {"dtype": "fp32", "precision": "fp32"}, known, [record], H200)
    assert seen[1].products == 0
    assert slower["predicted_us"] > found["predicted_us"]


def test_of_a_tuple_the_elements_are_arguments() -> None:
    assert list(counting._parts("s", (1, 16))) == [("s[0]", 1), ("s[1]", 16)]
    assert list(counting._parts("s", None)) == [("s", None)]


def test_larger_problems_are_predicted_to_take_longer(file: Path) -> None:
    for gpu in (H200, MI300X):
        for mode in ("fwd", "fwd+bwd"):
            us = [
                row["predicted_us"]
                for row in rows.read([file])
                if row["gpu"] == gpu.name and row["mode"] == mode
            ]
            assert us == sorted(us)  # so small that some take the same


def test_predictions_of_real_cases_tell_sizes_and_modes_apart() -> None:
    found = {
        (row["gpu"], row["case"], row["mode"]): row["predicted_us"]
        for row in rows.read([rows.RESULTS / rows.PREDICTED])
        if row["op"] == "focal" and row["dtype"] == "bf16"
    }
    for gpu in (H200.name, MI300X.name):
        one = found[gpu, "retinanet", "fwd+bwd"]
        assert one > found[gpu, "retinanet", "fwd"]
        assert found[gpu, "retinanet-batch8", "fwd+bwd"] > 4 * one


def test_the_report_says_what_it_is_not(file: Path) -> None:
    text = static.report(rows.read([file]))
    assert text.startswith("PREDICTED, NOT YET MEASURED")
    assert "focal 1024x80 bf16 fwd+bwd" in text
    assert "focal_rows_kernel, focal 1024x80 bf16 fwd+bwd" in text
    assert "AMD Instinct MI300X (gfx942)" in text


def test_every_row_is_a_line_of_json_that_says_where_it_is_from(file: Path) -> None:
    for line in file.read_text().splitlines():
        row = json.loads(line)
        assert {"op", "case", "date", "command", "torch", "triton"} <= set(row)
        assert row["commit"] == "abc"


def test_outside_a_checkout_it_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(rows, "IN_CHECKOUT", False)
    out = tmp_path / "rows.jsonl"
    assert static.run([bench.load("focal")], ["bf16"], "real", [H200], out) == 2
    assert "a checkout of the repository" in capsys.readouterr().out
    assert not out.exists()


def test_launches_are_counted_for_the_settings_of_each_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where two targets are launched alike, what is counted for one is said of both."""
    monkeypatch.setattr(_dispatch, "gpu", _dispatch.gpu)  # restores what the process sets
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr("tests.tools.interpreter.install_fixes", lambda: None)
    counted: list[str] = []

    def traffic(known: Any, small: Any, dtype: str, mode: str) -> rows.Row:
        counted.append(_dispatch.gpu(torch.device("cpu"))[1])
        return {"seen": counted[-1]}

    monkeypatch.setattr(counting, "_traffic", traffic)
    monkeypatch.setattr(counting, "_outline", lambda *_: {})

    def told() -> list[tuple[str, str]]:
        counted.clear()
        counting._count(["small", "iou", "fp32", "sm_80", "sm_90"])
        lines = capsys.readouterr().out.splitlines()
        found = [json.loads(line.removeprefix(counting.ROW)) for line in lines]
        return [(row["target"], row["seen"]) for row in found[:2]]

    assert told() == [("sm_80", "sm_80"), ("sm_90", "sm_80")]

    def on(settings: Any, like: torch.Tensor) -> dict[str, str]:
        return {"BLOCK": _dispatch.gpu(like.device)[1]}

    monkeypatch.setattr("dlops_triton._settings.Settings.on", on)
    assert told() == [("sm_80", "sm_80"), ("sm_90", "sm_90")]
