"""The compile gate finds the faults it is for: each test plants one, beside a sound twin."""

from __future__ import annotations

import pytest

from tests.tools import planted
from tests.tools.compile_gate import Record
from tests.tools.fixtures import shared_gate
from tests.tools.machine_code import _NVIDIA_OPCODES, _count, _parse_sass


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    records = shared_gate(tmp_path_factory, "tests.tools.planted:CASES", ("sm_90", "gfx90a"))

    def find(case: str, target: str = "sm_90") -> Record:
        (record,) = (r for r in records if (r.case, r.target) == (case, target))
        return record

    find.records = records
    return find


def test_gate_compiles_each_specialisation_once(compiled):
    cases = [name for name, _ in planted.CASES if name != "even again"]
    assert [(r.target, r.case) for r in compiled.records] == [
        (target, case) for target in ("sm_90", "gfx90a") for case in cases
    ]
    even, ragged = compiled("even"), compiled("ragged")
    assert even.kernel == "double_kernel"
    assert even.constants == {"EXTRA": 0, "EVEN": True, "BLOCK": 1024}
    assert even.arguments["x_ptr"] == "*fp32 tt.divisibility=16"
    assert (even.arguments["n"], ragged.arguments["n"]) == ("i32 tt.divisibility=16", "i32")
    assert even.num_warps == 4


def test_gate_finds_unvectorised_loads(compiled):
    for target in ("sm_90", "gfx90a"):
        n = compiled("even", target).code.counts
        assert n["load"] == n["load_128"] == n["store"] == n["store_128"] > 0
        n = compiled("ragged", target).code.counts
        assert n["load"] > 0 == n["load_128"]
    assert compiled("rows").code.loop_counts["load_128"] > 0
    assert compiled("odd rows").code.loop_counts["load"] >= 4
    assert compiled("odd rows").code.loop_counts["load_128"] == 0


def test_gate_finds_spills(compiled):
    for record in compiled.records:
        spills = record.case == "spill" and record.target == "sm_90"
        assert (record.code.stack + record.code.spilled > 0) == spills, record
    n = compiled("spill").code.counts
    assert n["local_load"] > 0
    assert n["local_store"] > 0


def test_gate_finds_inexact_division(compiled):
    exact, rough = compiled("exact division"), compiled("division")
    assert "div.rn.f32" in exact.ptx
    assert "div.full" not in exact.ptx
    assert "div.full.f32" in rough.ptx


def test_gate_finds_what_does_not_compile(compiled):
    for target in ("sm_90", "gfx90a"):
        assert "Break" in compiled("break", target).error
    assert not compiled("PTX").error
    assert "output register" in compiled("PTX", "gfx90a").error
    refused = [(r.case, r.target) for r in compiled.records if r.error]
    assert refused == [("break", "sm_90"), ("break", "gfx90a"), ("PTX", "gfx90a")]


def test_gate_counts_the_innermost_loop(compiled):
    for target in ("sm_90", "gfx90a"):
        code = compiled("rows", target).code
        assert 0 < code.loop_instructions < code.instructions
        assert code.loop_counts["load"] > 0 == code.loop_counts["store"]
        assert compiled("even", target).code.loop_instructions == 0
        assert code.registers > 0


def test_gate_leaves_out_what_a_division_seldom_calls():
    code = _count(
        _parse_sass("""
        .L_x_0:
            /*0000*/ MUFU.RCP R0, R1 ;
            /*0010*/ @!P1 BRA `(.L_x_1) ;
            /*0020*/ MOV R4, 0x10 ;
            /*0030*/ CALL.REL.NOINC `($slow) ;
        .L_x_1:
            /*0040*/ @!P1 BRA `(.L_x_2) ;
            /*0050*/ STG.E desc[UR4][R2.64], R0 ;
        .L_x_2:
            /*0060*/ @P2 BRA `(.L_x_0) ;
        """),
        _NVIDIA_OPCODES,
    )
    assert (code.instructions, code.loop_instructions, code.loop_counts["call"]) == (7, 5, 1)
