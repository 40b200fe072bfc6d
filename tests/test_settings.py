"""Launch settings: which table a GPU reads, what it may say, and that launches have them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import dlops_triton
from dlops_triton import (
    _dispatch,
    _nms,
    _settings,
    box_iou,
    box_match,
    deform_conv2d,
    deform_sample,
    generalized_box_iou,
    generalized_box_iou_loss,
    ghmc_loss,
    ghmr_loss,
    nms,
    sigmoid_focal_loss,
    soft_nms,
    softmax_focal_loss,
)
from dlops_triton._settings import Settings, override
from tests.tools.compile_gate import run_gate

NMS: Any = sys.modules[dlops_triton.nms.__module__]
HALF, FLOAT, DOUBLE = torch.float16, torch.float32, torch.float64


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tables, beside invented settings named "op"."""
    monkeypatch.setattr(_settings, "ALL", dict(_settings.ALL))
    monkeypatch.setattr(_settings, "folders", [tmp_path])
    Settings("op", fp32={"BLOCK": 64, "num_warps": 4}, fp64={"BLOCK": 32, "num_warps": 4})
    _settings.reload()
    yield tmp_path
    monkeypatch.undo()
    _settings.reload()


@pytest.fixture
def on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, int]]:
    """The settings "op" as a launch on a GPU of some name and target gets them."""

    def settings(gpu: str, target: str, dtype: torch.dtype = FLOAT) -> dict[str, int]:
        monkeypatch.setattr(_dispatch, "gpu", lambda device: (gpu, target))
        return dict(_settings.ALL["op"].on(torch.empty(0, dtype=dtype)))

    return settings


def write(folder: Path, gpu: str, target: str, name: str = "op", **by_size: dict[str, int]) -> None:
    """A table; ``by_size`` is named s2, s4."""
    sizes = {size[1:]: values for size, values in by_size.items()}
    content = {"gpu": gpu, "target": target, "settings": {name: sizes}}
    (folder / f"{gpu}.json").write_text(json.dumps(content))


# --- which table ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "target", "block"),
    [
        ("A", "sm_90", 1),  # its own table, though B's is of the same architecture
        ("B", "sm_90", 2),
        ("unknown", "sm_90", 1),  # another GPU of the architecture
        ("unknown", "sm_80", 8),
        ("unknown", "sm_89", 1),  # the nearest: 90
        ("unknown", "sm_86", 1),
        ("unknown", "sm_85", 8),  # as near to 80 as to 90: the older
        ("unknown", "sm_75", 8),
        ("unknown", "sm_100", 1),
        ("unknown", "sm_120", 1),
        ("unknown", "gfx942", 16),
        ("unknown", "gfx950", 16),  # 0x950 is 14 from 0x942 and 64 from 0x90a...
        ("unknown", "gfx90a", 32),
        ("unknown", "gfx908", 32),  # ... and 0x908 is nearest to 0x90a
        ("C", "sm_80", 8),
        ("unknown", "", 64),  # neither vendor's: the default
        ("unknown", "sm_", 64),
        ("unknown", "xe_12", 64),
        ("", "", 64),  # the CPU
    ],
)
def test_the_nearest_table_counts(
    gpu: str, target: str, block: int, folder: Path, on: Callable[..., dict[str, int]]
) -> None:
    for table in (
        ("A", "sm_90", 1),
        ("B", "sm_90", 2),
        ("C", "sm_80", 8),
        ("M", "gfx942", 16),
        ("N", "gfx90a", 32),
    ):
        write(folder, *table[:2], s4={"BLOCK": table[2], "num_warps": 8})
    assert on(gpu, target) == {"BLOCK": block, "num_warps": 4 if block == 64 else 8}


def test_without_a_table_of_its_vendor_a_gpu_has_the_defaults(
    folder: Path, on: Callable[..., dict[str, int]]
) -> None:
    assert on("A", "sm_90") == {"BLOCK": 64, "num_warps": 4}
    write(folder, "M", "gfx942", s4={"BLOCK": 16})
    _settings.reload()
    assert on("A", "sm_90") == {"BLOCK": 64, "num_warps": 4}


def test_dtypes_are_apart_and_what_is_missing_is_the_next_table_s_or_the_default(
    folder: Path, on: Callable[..., dict[str, int]]
) -> None:
    write(folder, "A", "sm_90", s2={"BLOCK": 128})
    assert on("A", "sm_90", HALF) == {"BLOCK": 128, "num_warps": 4}
    assert on("A", "sm_90", torch.bfloat16) == {"BLOCK": 128, "num_warps": 4}
    assert on("A", "sm_90", FLOAT) == {"BLOCK": 64, "num_warps": 4}
    assert on("A", "sm_90", DOUBLE) == {"BLOCK": 32, "num_warps": 4}
    write(folder, "B", "sm_80", s2={"BLOCK": 1}, s4={"BLOCK": 256})
    _settings.reload()
    assert on("A", "sm_90", HALF)["BLOCK"] == 128
    assert on("A", "sm_90", FLOAT)["BLOCK"] == 256
    write(folder, "A", "sm_90", s2={"BLOCK": 128}, s8={"BLOCK": 2})
    _settings.reload()
    assert on("A", "sm_90", DOUBLE) == {"BLOCK": 2, "num_warps": 4}


def test_of_two_folders_the_first_counts(
    folder: Path, on: Callable[..., dict[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    write(folder, "A", "sm_90", s4={"BLOCK": 128})
    other = tmp_path_factory.mktemp("other")
    write(other, "A", "sm_90", s4={"BLOCK": 256})
    _settings.folders.insert(0, other)
    assert on("A", "sm_90")["BLOCK"] == 256


def test_a_launch_looks_nothing_up_twice(
    folder: Path, on: Callable[..., dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "A", "sm_90", s4={"BLOCK": 128})
    first, other = on("A", "sm_90"), on("A", "sm_80", HALF)
    monkeypatch.setattr(Settings, "look_up", None)
    assert on("A", "sm_90") == first
    assert on("A", "sm_80", HALF) == other


def test_the_name_and_the_target_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _dispatch.gpu.cache_clear()
    asked = []

    def properties(device: torch.device) -> Any:
        asked.append(device.index)
        arch = "gfx942:sramecc+:xnack-"
        return SimpleNamespace(name=f"GPU {device.index}", major=9, minor=0, gcnArchName=arch)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert _dispatch.gpu(torch.device("cpu")) == ("", "")
    for _ in range(2):
        assert _dispatch.gpu(torch.device("cuda:0")) == ("GPU 0", "sm_90")
        assert _dispatch.gpu(torch.device("cuda:1")) == ("GPU 1", "sm_90")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _dispatch.gpu(torch.device("cuda:2")) == ("GPU 2", "gfx942")
    assert asked == [0, 1, 2]
    _dispatch.gpu.cache_clear()


# --- what a table may say ---------------------------------------------------------------------


def table(**settings: Any) -> dict[str, Any]:
    return {"gpu": "A", "target": "sm_90", "settings": settings}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        (b"\xff", "utf-8"),
        ({"target": "sm_90", "settings": {}}, "it lacks 'gpu'"),
        ({"gpu": "A", "settings": {}}, "it lacks 'target'"),
        ({"gpu": "A", "target": "sm_90"}, "it lacks 'settings'"),
        ({"gpu": "A", "target": "xe_12", "settings": {}}, "no compiler has the target 'xe_12'"),
        ({"gpu": "A", "target": 90, "settings": {}}, "startswith"),
        (table() | {"settings": []}, "items"),
        (table(opp={"4": {}}), "no kernel has settings named 'opp'"),
        (table(op={"5": {}}), "op: no dtype has '5' bytes per element"),
        (table(op={"4": [1]}), "items"),
        (table(op={"4": {"BLOK": 1}}), "op has no setting 'BLOK', but BLOCK, num_warps"),
        (table(op={"4": {"BLOCK": 0}}), "op: BLOCK must be a positive integer, got 0"),
        (table(op={"4": {"BLOCK": "64"}}), "op: BLOCK must be a positive integer, got '64'"),
        (table(op={"4": {"BLOCK": True}}), "op: BLOCK must be a positive integer, got True"),
    ],
)
def test_a_malformed_table_is_an_error_that_names_the_file(
    content: Any, message: str, folder: Path, on: Callable[..., dict[str, int]]
) -> None:
    file = folder / "broken.json"
    text = json.dumps(content) if isinstance(content, dict) else content
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(2):  # an error is not forgotten
        with pytest.raises(ValueError, match=message) as raised:
            on("A", "sm_90")
        assert str(file) in str(raised.value)
    assert on("", "") == {"BLOCK": 64, "num_warps": 4}  # the CPU reads no table


def test_every_table_in_the_package_is_sound() -> None:
    assert _settings.TUNED.is_dir()
    files = sorted(_settings.TUNED.glob("*.json"))
    for file in files:
        content = json.loads(file.read_text())
        assert set(content) == {"gpu", "target", "commit", "date", "torch", "triton", "settings"}
        found = _settings.read(file)
        for name, by_size in found.settings.items():
            for size, values in by_size.items():
                assert set(values) == set(_settings.ALL[name].defaults[FLOAT]), f"{file}: {name}"
                sound(name, values, f"{file}: {name} {size}")
    gpus = [_settings.read(file).gpu for file in files]
    assert len(set(gpus)) == len(gpus)


def sound(name: str, values: dict[str, int] | Any, where: str) -> None:
    for key, value in values.items():
        assert key in ("programs", "num_stages") or value == triton.next_power_of_2(value), where
    if "ROWS" in values:
        assert 32 % values["ROWS"] == 0, where
    if name.startswith("nms") and "BLOCK" in values:
        assert values["BLOCK"] % 32 == 0, where
    if name == "nms_mask":
        assert all(_nms.band(n) % values["BLOCK"] == 0 for n in (30_000, 10**5, 10**6)), where


def test_the_defaults_are_sound_and_both_dtypes_have_the_same_settings() -> None:
    assert set(_settings.ALL) == {
        *("focal_sum", "focal_fwd", "focal_bwd", "scale", "iou_fwd", "iou_bwd"),
        *("iou_penalty_fwd", "iou_penalty_bwd", "iou_loss_fwd", "iou_loss_bwd"),
        *("softmax_focal", "softmax_focal_long"),
        *("ghm_count_rows", "ghm_count", "ghm_loss_rows", "ghm_loss", "ghm_bwd"),
        *("nms_small", "nms_segments", "nms_mask", "nms_resolve", "nms_suppress"),
        *("soft_nms", "match", "match_low_quality"),
        *("deform_plan", "deform_sample_fwd", "deform_sample_bwd", "deform_shift_bwd"),
        *("deform_gather", "deform_conv_fwd", "deform_conv_bwd", "deform_conv_wgrad"),
    }
    for name, settings in _settings.ALL.items():
        for dtype, values in settings.defaults.items():
            assert set(values) == set(settings.defaults[FLOAT])
            sound(name, values, f"{name} {dtype}")


def test_a_name_is_given_once(folder: Path) -> None:
    with pytest.raises(ValueError, match="there are settings named 'op' already"):
        Settings("op", fp32={})


# --- overrides --------------------------------------------------------------------------------


def test_override(folder: Path, on: Callable[..., dict[str, int]]) -> None:
    write(folder, "A", "sm_90", s4={"BLOCK": 128})
    with override("op", num_warps=1) as outer:
        assert on("A", "sm_90") == {"BLOCK": 128, "num_warps": 1}
        with override("op", BLOCK=2) as inner:
            assert on("A", "sm_90") == {"BLOCK": 2, "num_warps": 1}
            assert on("A", "sm_90", DOUBLE) == {"BLOCK": 2, "num_warps": 1}
        assert on("", "") == {"BLOCK": 64, "num_warps": 1}
    assert (outer.launches, inner.launches) == (2, 2)
    assert on("A", "sm_90") == {"BLOCK": 128, "num_warps": 4}
    with pytest.raises(ZeroDivisionError), override("op", BLOCK=2):
        raise ZeroDivisionError
    assert on("A", "sm_90")["BLOCK"] == 128
    with pytest.raises(ValueError, match="op has no setting 'BLOK', but"), override("op", BLOK=1):
        pass


# --- launches ---------------------------------------------------------------------------------


def launched(monkeypatch: pytest.MonkeyPatch, gpu: str, target: str) -> dict[str, dict[str, Any]]:
    """What each kernel is launched with on some GPU, in half precision."""
    found: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(_dispatch, "gpu", lambda device: (gpu, target))
    monkeypatch.setattr(_dispatch, "cpu_implementation", "kernel")
    monkeypatch.setattr(
        _dispatch, "launch", lambda kernel, *_, **s: found.setdefault(kernel.fn.__name__, s)
    )
    boxes = torch.zeros(9, 4, dtype=HALF, requires_grad=True)
    generalized_box_iou(boxes, boxes).backward(torch.zeros(9, 9, dtype=HALF))
    found["box_iou_penalty_fwd_kernel"] = found.pop(
        "box_iou_fwd_kernel"
    )  # it has settings for each
    generalized_box_iou_loss(boxes, boxes, "sum").backward()
    x = torch.zeros(9, 5, dtype=HALF, requires_grad=True)
    sigmoid_focal_loss(x, torch.zeros(9, 5), reduction="sum").backward()
    wide = torch.zeros(9, 5, dtype=torch.bfloat16, requires_grad=True)
    sigmoid_focal_loss(wide, torch.zeros(9, dtype=torch.long), reduction="sum").backward()
    for classes in (5, 5000):
        softmax_focal_loss(torch.zeros(9, classes, dtype=HALF), torch.zeros(9, dtype=torch.long))
    ghmc_loss(wide, torch.zeros(9, dtype=torch.long))
    ghmr_loss(wide, torch.zeros(9, 5), reduction="none").backward(torch.zeros(9, 5))
    box_iou(boxes, boxes).backward(torch.zeros(9, 9, dtype=HALF))
    nms(torch.zeros(9, 4, dtype=HALF), torch.zeros(9), 0.5)
    for n, ids in ((_nms.ONE_BAND + 1, None), (2100, torch.zeros(2100, dtype=torch.long))):
        many = torch.zeros(n, 4, dtype=HALF), torch.zeros(n, dtype=HALF)
        NMS._launch(*many, ids, 0.5, 0, None, None)
    soft_nms(torch.zeros(3000, 4, dtype=HALF), torch.zeros(3000))
    box_match(boxes, boxes)
    image, weight, offset = (
        torch.zeros(size, dtype=HALF, requires_grad=True)
        for size in ((1, 128, 4, 4), (512, 128, 1, 1), (1, 2, 4, 4))
    )
    for in_order in (False, True):
        torch.use_deterministic_algorithms(in_order, warn_only=True)
        convolved = deform_conv2d(image, offset, weight)
        convolved.backward(torch.zeros_like(convolved))
    deform_sample(image, offset, 1)
    return found


def test_every_launch_has_its_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel those of its own name, from the table of the GPU, for the dtype of its input."""
    tuned = {
        name: {"2": {key: 2 * value for key, value in settings.defaults[FLOAT].items()}}
        for name, settings in _settings.ALL.items()
        if name != "op"
    }
    content = {"gpu": "A", "target": "sm_90", "settings": tuned}
    (folder / "a.json").write_text(json.dumps(content))
    for gpu, target, factor in (("A", "sm_90", 2), ("", "", 1)):
        found = launched(monkeypatch, gpu, target)
        assert len(found) == 34
        for name, settings in _settings.ALL.items():
            if name == "op":
                continue
            boxed = name.startswith("iou") and "loss" not in name
            stem = {"focal_sum": "focal_rows"}.get(name, f"{'box_' * boxed}{name}")
            kernel = found[f"{stem}_kernel"]
            for key, value in settings.defaults[FLOAT].items():
                if key == "LINE":  # bytes
                    assert kernel["BK"] == factor * value // 2, name
                elif key not in ("programs", "BLOCKS", "SPLIT"):
                    assert kernel[key] == factor * value, name
        assert found["nms_resolve_kernel"]["BLOCK"] == found["nms_mask_kernel"]["BLOCK"]


def loss_with_tables() -> None:
    """For the gate's process: a launch where two targets have a table."""
    _settings._tables = lambda: [  # type: ignore[assignment]
        _settings.Table("A", "sm_90", {"focal_fwd": {"4": {"BLOCK": 256, "num_warps": 2}}}),
        _settings.Table("C", "sm_80", {"focal_fwd": {"4": {"BLOCK": 512, "num_warps": 8}}}),
    ]
    sigmoid_focal_loss(torch.zeros(64, 80), torch.zeros(64, 80))


GATE_CASES = [("loss", loss_with_tables)]


@pytest.mark.xdist_group("gate")
def test_the_compile_gate_compiles_with_the_settings_of_its_target() -> None:
    records = run_gate(f"{__name__}:GATE_CASES", ["sm_80", "sm_90", "gfx942"], processes=1)
    assert {r.target: (r.constants["BLOCK"], r.num_warps) for r in records} == {
        "sm_80": (512, 8),
        "sm_90": (256, 2),
        "gfx942": (1024, 4),
    }
