"""What every kernel compiles to, for eight GPUs that need not be here."""

from __future__ import annotations

import re

import pytest

from tests.tools.compile_gate import TARGETS, Record

KERNELS = {
    "focal_fwd_kernel",
    "focal_bwd_kernel",
    "focal_rows_kernel",
    "focal_columns_kernel",
    "scale_kernel",
    "softmax_focal_kernel",
    "softmax_focal_long_kernel",
    "ghm_count_kernel",
    "ghm_count_rows_kernel",
    "ghm_loss_kernel",
    "ghm_loss_rows_kernel",
    "ghm_bwd_kernel",
    "box_iou_fwd_kernel",
    "box_iou_bwd_kernel",
    "nms_small_kernel",
    "nms_segments_kernel",
    "nms_list_kernel",
    "match_kernel",
    "match_low_quality_kernel",
    "box_iou_penalty_bwd_kernel",
    "iou_loss_fwd_kernel",
    "iou_loss_bwd_kernel",
    "nms_mask_kernel",
    "nms_resolve_kernel",
    "nms_suppress_kernel",
    "soft_nms_kernel",
    "deform_plan_kernel",
    "deform_shift_bwd_kernel",
    "deform_sample_fwd_kernel",
    "deform_sample_bwd_kernel",
    "deform_gather_kernel",
    "deform_conv_fwd_kernel",
    "deform_conv_bwd_kernel",
    "deform_conv_wgrad_kernel",
}
# That compare an IoU with a threshold, exactly but without a division: two fused multiply-adds.
COMPARING = {"nms_small_kernel", "nms_segments_kernel", "nms_mask_kernel", "nms_suppress_kernel"}
# Whose result is compared with a threshold, here or by the caller.
EXACT = {"box_iou_fwd_kernel", "match_kernel", "match_low_quality_kernel"} | COMPARING

pytestmark = [pytest.mark.xdist_group("gate"), pytest.mark.filterwarnings("default")]


def test_every_kernel_compiles_for_every_target(gate: list[Record]) -> None:
    refused = [f"{record}: {record.error}" for record in gate if record.error]
    assert not refused, "\n".join(refused)
    assert {(r.kernel, r.target) for r in gate} == {(k, t) for k in KERNELS for t in TARGETS}


def test_nothing_spills_on_sm_90(gate: list[Record]) -> None:
    spilling = [str(r) for r in gate if r.target == "sm_90" and (r.code.spilled or r.code.stack)]
    assert not spilling, "\n".join(spilling)


def test_deciding_arithmetic_is_ieee(gate: list[Record]) -> None:
    """Rounded division, no contraction but what is meant, no flushing of small numbers."""
    seen = set()
    for record in gate:
        penalized = record.constants.get("KIND", "iou") not in ("iou", "iof")
        if record.kernel in EXACT and not penalized and record.target.startswith("sm_"):
            division = set(re.findall(r"\bdiv\.[a-z.]+f(?:32|64)\b", record.ptx))
            fused = re.findall(r"\bfma\.rn\.f\S*", record.ptx)
            if record.kernel in COMPARING and fused and "fma.rn.f64" not in fused:
                assert not division, f"{record}: {division}"
                assert len(fused) % 2 == 0, str(record)
            else:
                assert division in ({"div.rn.f32"}, {"div.rn.f64"}), f"{record}: {division}"
                assert not fused, f"{record}: {fused}"
            wrong = re.findall(r"\b(?:mad\.rn\.f|sqrt\.approx|rcp\.approx)\S*", record.ptx)
            wrong += re.findall(r"\b(?:add|sub|mul|div|min|max)\S*\.ftz\S*", record.ptx)
            # Without a rounding the assembler may contract.
            wrong += re.findall(r"\b(?:add|sub|mul)\.f(?:32|64)\b", record.ptx)
            assert not wrong, f"{record}: {wrong}"
            seen.add(record.kernel)
    assert seen == EXACT


def test_logits_move_in_vectors_of_16_bytes(gate: list[Record]) -> None:
    for record in gate:
        if record.target != "sm_90" or not re.match("focal|scale", record.kernel):
            continue
        counts = record.code.counts
        assert counts["load_128"] >= 1, str(record)
        if record.kernel == "focal_bwd_kernel" or record.constants.get("REDUCE") is False:
            assert counts["store"] == counts["store_128"], str(record)
        if record.kernel in ("focal_rows_kernel", "focal_columns_kernel"):
            loop = record.code.loop_counts
            assert loop["load"] == loop["load_128"] >= 2, str(record)
            assert (
                loop["store"] == loop["store_128"] == ("dx_ptr" in record.arguments) * loop["load"]
            ), str(record)


@pytest.mark.parametrize(
    ("case", "kernel", "ceiling"),
    [
        # The loop over blocks of plain negatives. Arithmetic alone is 16 and 20.5.
        ("focal bfloat16 labels sum no gradient", "focal_rows_kernel", 17),
        ("focal bfloat16 labels sum", "focal_rows_kernel", 22),
        ("focal bfloat16 columns sum", "focal_columns_kernel", 22),
        ("focal bfloat16 labels sum no gradient portable", "focal_rows_kernel", 19),
        ("focal bfloat16 labels sum portable", "focal_rows_kernel", 24),
        # Straight code, in which every instruction counts once.
        ("focal bfloat16 labels none", "focal_fwd_kernel", 80),
        ("focal bfloat16 labels none", "focal_bwd_kernel", 100),
    ],
)
def test_instructions_per_logit(case: str, kernel: str, ceiling: int, gate: list[Record]) -> None:
    """bf16, integer labels, gamma 2 on sm_90."""
    (record,) = (r for r in gate if (r.case, r.kernel, r.target) == (case, kernel, "sm_90"))
    code = record.code
    count = code.loop_instructions if code.loop_instructions else code.instructions
    assert count * record.num_warps * 32 / record.constants["BLOCK"] <= ceiling
    assert code.loop_instructions == 0 or code.loop_counts["special"] == 2 * (
        record.constants["BLOCK"] // (32 * record.num_warps)
    )


@pytest.mark.parametrize(
    ("case", "kernel", "ceiling"),
    [
        ("nms small float32", "nms_small_kernel", 19),
        ("nms segments float32", "nms_segments_kernel", 17),
        ("nms segments classes float32", "nms_segments_kernel", 17),
        ("nms bands float32", "nms_mask_kernel", 19),
        ("nms bands float32", "nms_suppress_kernel", 16),
    ],
)
def test_instructions_per_pair(case: str, kernel: str, ceiling: int, gate: list[Record]) -> None:
    """fp32 boxes on sm_90, which are loaded by 16 bytes; 13 are arithmetic."""
    (record,) = (r for r in gate if (r.case, r.kernel, r.target) == (case, kernel, "sm_90"))
    code, constants = record.code, record.constants
    pairs = constants["ROWS"] * constants["BLOCK"] / (32 * record.num_warps)
    assert code.loop_instructions / pairs <= ceiling
    assert code.loop_counts["load_128"] == constants["ROWS"]
    assert code.loop_counts["barrier"] == 0


@pytest.mark.parametrize(
    "case",
    [
        "soft_nms float32 1024",
        "soft_nms float32 5000",
        "soft_nms float32 linear classes",
        "soft_nms bfloat16 hard offset 1",
    ],
)
def test_instructions_per_selection(case: str, gate: list[Record]) -> None:
    """Of 1,024 boxes in registers, and per warp of 8."""
    (record,) = (r for r in gate if (r.case, r.target) == (case, "sm_90"))
    assert (record.constants["SIZE"], record.num_warps) == (1024, 8)
    assert record.code.loop_instructions <= 160


def test_box_losses_move_boxes_in_vectors_of_16_bytes(gate: list[Record]) -> None:
    for record in gate:
        if record.target != "sm_90" or not record.kernel.startswith("iou_loss"):
            continue
        # A box is one vector in fp32, two in fp64, half of one else.
        wide = {"*fp32": 1, "*fp64": 2}.get(record.arguments["boxes1_ptr"].split()[0], 0)
        counts = record.code.counts
        assert counts["load_128"] >= 2 * wide, str(record)
        if record.kernel == "iou_loss_bwd_kernel":
            sides = ("d1_ptr" in record.arguments) + ("d2_ptr" in record.arguments)
            assert counts["store_128"] == sides * wide, str(record)
            assert counts["store"] == sides * max(wide, 1), str(record)


def test_numbers_of_boxes_are_not_compiled_for(gate: list[Record]) -> None:
    """They differ from image to image, and each kind of number would be compiled anew."""
    for record in gate:
        if "nms" in record.kernel:
            sizes = {"n", "size", "max_output", "limit", "end"}
            assert not sizes & set(record.constants), str(record)
            assert {record.arguments.get(name, "i32") for name in sizes} == {"i32"}, str(record)


def test_the_resolver_reads_its_bitmask_in_vectors(gate: list[Record]) -> None:
    for record in gate:
        if record.kernel == "nms_resolve_kernel" and record.target == "sm_90":
            assert record.code.counts["load_128"] >= 16, str(record)


def test_instructions_per_pair_of_a_match(gate: list[Record]) -> None:
    """fp32 on sm_90, when nothing is left out; and reductions by one instruction of the warp.

    Four of them spare an overlap of 0 the detour of the division, which is not counted.
    """
    for record in gate:
        if record.target != "sm_90" or not record.case.startswith("match float32"):
            continue
        code, tile = record.code, record.constants["BLOCK_N"] * record.constants["BLOCK_M"]
        assert code.loop_instructions * record.num_warps * 32 / tile <= 52, str(record)
        assert code.loop_counts["warp_reduction"] >= 2, str(record)
        assert code.loop_counts["shuffle"] == 0, str(record)


def deformable(gate: list[Record], kernel: str, target: str = "sm_90") -> Record:
    (found,) = (
        r for r in gate if (r.case, r.target) == ("deform_conv bfloat16", target)
        if r.kernel == f"deform_{kernel}_kernel"
    )  # fmt: skip
    return found


def test_deformable_convolution_multiplies_by_tensor_cores(gate: list[Record]) -> None:
    """Asynchronously on sm_90, one product a step whose operand is in registers; gathers of 16
    bytes, which L1 keeps: four of a chunk of 64 channels for 64 outputs, ahead of their use."""
    record = deformable(gate, "conv_fwd")
    tile = {name: record.constants[name] for name in ("BM", "BN", "BK")}
    assert tile == {"BM": 64, "BN": 256, "BK": 64}
    assert record.code.loop_instructions <= 700
    loop = record.code.loop_counts
    assert loop["tensor"] == 4  # 16 channels each
    assert record.ptx.count("wgmma.mma_async") == 4
    gathers = re.findall(r"cp\.async\.ca\.shared\.global \[.*?\], \[.*?\], 0x10", record.ptx)
    assert len(gathers) == 2 * 4 * 4  # before the loop and in it
    for other in ("conv_bwd", "conv_wgrad"):
        assert "wgmma.mma_async" in deformable(gate, other).ptx
    for kernel in ("conv_fwd", "conv_bwd", "conv_wgrad"):
        assert deformable(gate, kernel, "gfx942").code.counts["tensor"] > 0


def test_gradient_by_the_image_is_added_in_vectors(gate: list[Record]) -> None:
    """Four fp32 channels an instruction, that returns nothing."""
    for record in gate:
        scatters = record.kernel in ("deform_conv_bwd_kernel", "deform_sample_bwd_kernel")
        if scatters and record.target == "sm_90" and "bfloat16" in record.case:
            added = set(re.findall(r"\b(?:red|atom)\.\S*add\S*", record.ptx))
            assert added == {"red.global.gpu.relaxed.add.v4.f32"}, str(record)
