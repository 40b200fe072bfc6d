"""What every kernel compiles to, for eight GPUs that need not be here."""

from __future__ import annotations

import re

import pytest

from tests.tools.compile_gate import TARGETS, Record

KERNELS = {
    "focal_fwd_kernel",
    "focal_bwd_kernel",
    "box_iou_fwd_kernel",
    "box_iou_bwd_kernel",
    "nms_mask_kernel",
    "nms_resolve_kernel",
    "nms_suppress_kernel",
}
# Whose result is compared with a threshold, here or by the caller.
EXACT = {"box_iou_fwd_kernel", "nms_mask_kernel", "nms_suppress_kernel"}

pytestmark = [pytest.mark.xdist_group("gate"), pytest.mark.filterwarnings("default")]


def test_every_kernel_compiles_for_every_target(gate: list[Record]) -> None:
    refused = [f"{record}: {record.error}" for record in gate if record.error]
    assert not refused, "\n".join(refused)
    assert {(r.kernel, r.target) for r in gate} == {(k, t) for k in KERNELS for t in TARGETS}


def test_nothing_spills_on_sm_90(gate: list[Record]) -> None:
    spilling = [str(r) for r in gate if r.target == "sm_90" and (r.code.spilled or r.code.stack)]
    assert not spilling, "\n".join(spilling)


def test_deciding_arithmetic_is_ieee(gate: list[Record]) -> None:
    """Rounded division, no contraction, no flushing of small numbers."""
    seen = set()
    for record in gate:
        if record.kernel in EXACT and record.target.startswith("sm_"):
            division = set(re.findall(r"\bdiv\.[a-z.]+f(?:32|64)\b", record.ptx))
            assert division in ({"div.rn.f32"}, {"div.rn.f64"}), f"{record}: {division}"
            wrong = re.findall(
                r"\b(?:fma\.rn\.f|mad\.rn\.f|sqrt\.approx|rcp\.approx)\S*", record.ptx
            )
            wrong += re.findall(r"\b(?:add|sub|mul|div|min|max)\S*\.ftz\S*", record.ptx)
            assert not wrong, f"{record}: {wrong}"
            seen.add(record.kernel)
    assert seen == EXACT


def test_logits_move_in_vectors_of_16_bytes(gate: list[Record]) -> None:
    for record in gate:
        if record.target == "sm_90" and record.kernel.startswith("focal"):
            assert record.code.counts["load_128"] >= 1, str(record)
            if record.kernel == "focal_bwd_kernel" or not record.constants["REDUCE"]:
                assert record.code.counts["store"] == record.code.counts["store_128"], str(record)


@pytest.mark.parametrize(
    ("kernel", "ceiling"), [("focal_fwd_kernel", 115), ("focal_bwd_kernel", 135)]
)
def test_instructions_per_logit(
    kernel: str,
    ceiling: int,
    gate: list[Record],
) -> None:
    """bf16, integer labels, gamma 2 on sm_90. The code is straight, so instructions count once."""
    (count,) = {
        r.code.instructions * r.num_warps * 32 / r.constants["BLOCK"]
        for r in gate
        if r.kernel == kernel and r.target == "sm_90" and r.case == "focal bfloat16 labels sum"
    }
    assert count <= ceiling


def test_the_resolver_reads_its_bitmask_in_vectors(gate: list[Record]) -> None:
    for record in gate:
        if record.kernel == "nms_resolve_kernel" and record.target == "sm_90":
            assert record.code.counts["load_128"] >= 16, str(record)
