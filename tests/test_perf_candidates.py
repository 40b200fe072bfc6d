"""What the tuner tries on each op, and what it says of it without a GPU."""

from __future__ import annotations

import math
import pkgutil
from typing import Any

import pytest

from dlops_triton import _dispatch, _nms, _settings, kernels

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")

from dlops_triton.perf import OPS, bench, candidates, gpus
from tests.tools import compile_gate


@pytest.mark.parametrize("op", OPS)
def test_what_is_tried_can_be_launched(op: str) -> None:
    known = bench.load(op)
    families = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    longer = tuple(f for f in families if f.startswith(op) and f != op)  # iou_loss is not iou's
    prefix = {name for name in _settings.ALL if name.startswith(op) and not name.startswith(longer)}
    assert set(known.settings) == prefix
    for task in candidates.tasks([known]):
        present = task.present("", "")
        others = task.others(present)
        space = known.settings[task.setting]
        assert set(space) == set(present)
        assert all(present[key] in values for key, values in space.items())
        assert len(others) == math.prod(map(len, space.values())) - 1
        for values in others:
            _settings.ALL[task.setting].check(values)
            assert all(v & (v - 1) == 0 for k, v in values.items() if k != "num_stages")
            assert 32 % values.get("ROWS", 1) == 0
            if task.setting == "nms_mask":
                assert all(_nms.band(n) % values["BLOCK"] == 0 for n in (30_000, 10**6))


@pytest.mark.parametrize("op", OPS)
def test_each_candidate_is_launched_to_be_compiled(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(_dispatch, "cpu_implementation", "kernel")
    monkeypatch.setattr(
        _dispatch, "launch", lambda kernel, *_, **s: launches.append((kernel.fn.__name__, s))
    )
    cases = dict(getattr(candidates, f"sm_90,{op}"))
    tasks = candidates.tasks([bench.load(op)])
    assert len(cases) == sum(1 + len(task.others(task.present("", "sm_90"))) for task in tasks)
    for task in tasks:
        present = task.present("", "sm_90")
        for values in (present, *task.others(present)):
            note = " (at present)" if values == present else ""
            launches.clear()
            cases[f"{task}: {candidates.words(values)}{note}"]()
            stem = {"focal_sum": "focal_rows", "iou_penalty_fwd": "iou_fwd"}.get(
                task.setting, task.setting
            )
            kernel = f"{'box_' * (op == 'iou')}{stem}_kernel"
            assert any(
                name == kernel and all(s.get(k, v) == v for k, v in values.items())
                for name, s in launches
            )


# For the gate's process.
FIRST = [c for c in getattr(candidates, "sm_80,focal") if c[0].startswith("focal_fwd")][:2]


@pytest.mark.xdist_group("gate")
def test_without_a_gpu_the_candidates_are_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(cases: str, targets: list[str]) -> list[compile_gate.Record]:
        assert cases == "dlops_triton.perf.candidates:sm_80,focal"
        return run_gate(f"{__name__}:FIRST", targets, processes=1)

    run_gate = compile_gate.run_gate
    monkeypatch.setattr(compile_gate, "run_gate", some)
    assert candidates.compile_only([bench.load("focal")], [gpus.A100]) == 0
    printed = capsys.readouterr().out
    assert "COMPILED FOR NVIDIA A100-SXM4-80GB (sm_80), NOT MEASURED: nothing is decided" in printed
    present, other = printed.splitlines()[-2:]
    assert "focal_fwd, 2 bytes: BLOCK=1024 num_warps=4 (at present)" in present
    assert "focal_fwd, 2 bytes: BLOCK=512 num_warps=4" in other
    for line in (present, other):
        kernel, registers, spilled, shared, occupancy = line.split()[-5:]
        assert kernel == "focal_fwd_kernel"
        assert int(registers) > 0 == int(spilled)
        share = gpus.A100.occupancy(int(registers), int(shared), 4)
        assert occupancy == f"{share:.0%}"


def test_the_report_says_what_does_not_compile() -> None:
    record = compile_gate.Record("c", "k", "sm_80", {}, {}, 4, error="no such thing\nat all")
    assert candidates.report([record], gpus.A100).splitlines()[-1].split() == [
        *("c", "k", "REFUSED:", "no", "such", "thing"),
    ]
