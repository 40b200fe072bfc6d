"""What a compiled kernel is made of: registers, spills and instructions, read from its code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import triton

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# What to count, by a pattern of the opcode. Vector widths are per thread: 128 bits or more.
_NVIDIA_OPCODES = {
    "load": r"LDG\b",
    "load_128": r"LDG\.\S*(128|256)",
    "store": r"STG\b",
    "store_128": r"STG\.\S*(128|256)",
    "async_copy": r"LDGSTS|UTMA|UBLKCP",
    "atomic": r"ATOMG?\b",
    "reduction": r"REDG?\b",
    "shared_load": r"LDS\b|LDSM",
    "shared_store": r"STS\b|STSM",
    "shared_atomic": r"ATOMS",
    "local_load": r"LDL",
    "local_store": r"STL",
    "special": r"MUFU",
    "fma": r"FFMA|DFMA|HFMA",
    "double": r"D(ADD|MUL|FMA|SETP)\b",
    "tensor": r"[HIDQ]G?MMA|UTC\w*MMA",
    "warp_reduction": r"C?REDUX",
    "shuffle": r"SHFL",
    "barrier": r"BAR\b|WARPSYNC",
    "call": r"CALL",
}
_AMD_OPCODES = {
    "load": r"(global|buffer|flat)_load",
    "load_128": r"(global|buffer|flat)_load_(dwordx4|b128)",
    "store": r"(global|buffer|flat)_store",
    "store_128": r"(global|buffer|flat)_store_(dwordx4|b128)",
    "atomic": r"(global|buffer|flat)_atomic",
    "shared_load": r"ds_(read|load)",
    "shared_store": r"ds_(write|store)",
    "shared_atomic": r"ds_(add|min|max|and|or|xor|cmpst)",
    "local_load": r"scratch_load",
    "local_store": r"scratch_store",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "fma": r"v_(pk_)?(fma|fmac)_",
    "double": r"v_(add|mul|fma|fmac)_f64",
    "tensor": r"v_s?mfmac?_|v_wmma",
    "shuffle": r"ds_(bpermute|swizzle)|v_permlane",
    "barrier": r"s_barrier",
    "call": r"s_swappc",
}


@dataclass
class MachineCode:
    """One kernel on one target. Bytes are per thread; `registers` are vector registers on AMD."""

    registers: int = 0
    stack: int = 0
    spilled: int = 0  # bytes of local memory
    instructions: int = 0
    # Of the innermost loop, where a kernel spends its time; without its detours.
    loop_instructions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    loop_counts: dict[str, int] = field(default_factory=dict)


def from_cubin(cubin: bytes) -> MachineCode:
    """Disassemble a kernel for an NVIDIA GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        text = _run("nvdisasm", "-c", file.name)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = _count(_parse_sass(text), _NVIDIA_OPCODES)
    code.registers, code.stack = resources["REG"], resources["STACK"]
    code.spilled = resources["LOCAL"]
    return code


def from_amdgcn(text: str) -> MachineCode:
    """Read a kernel's assembly for an AMD GPU."""

    def resource(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    code = _count(_parse_amdgcn(text), _AMD_OPCODES)
    code.registers = resource("vgpr_count")
    code.stack = resource("private_segment_fixed_size")
    code.spilled = 4 * (resource("vgpr_spill_count") + resource("sgpr_spill_count"))
    return code


def _run(tool: str, *args: str) -> str:
    command = [str(_NVIDIA_TOOLS / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class _Listing:
    opcodes: list[str] = field(default_factory=list)  # in order, without padding
    loops: list[tuple[int, int]] = field(default_factory=list)  # first and last instruction
    # Likewise: straight code around a call that a branch jumps over, unless a division, say, has
    # operands so large or small that a subroutine must do it.
    detours: list[tuple[int, int]] = field(default_factory=list)


def _parse_sass(text: str) -> _Listing:
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\S*)\s*(.*?)\s*;")
    return _parse(text.splitlines(), re.compile(r"\.(L_x_\d+):"), instruction, "BRA")


def _parse_amdgcn(text: str) -> _Listing:
    body = text[: text.index(".amdhsa_kernel")] if ".amdhsa_kernel" in text else text
    instruction = re.compile(r"\s+([a-z]+_\w+)\s*(.*)")
    lines = (line.split(";")[0] for line in body.splitlines())
    return _parse(lines, re.compile(r"\.(LBB\d+_\d+):"), instruction, "s_c?branch")


def _parse(
    lines: Iterable[str], label: re.Pattern[str], instruction: re.Pattern[str], branch: str
) -> _Listing:
    listing = _Listing()
    labels: dict[str, int] = {}
    ahead: tuple[str, int] | None = None  # what the last branch jumps to, and what it jumps over
    for line in lines:
        if found := label.match(line.strip()):
            here = len(listing.opcodes)
            labels[found[1]] = here
            if ahead and ahead[0] == found[1] and "CALL" in "".join(listing.opcodes[ahead[1] :]):
                listing.detours.append((ahead[1], here - 1))
            ahead = None
        elif (found := instruction.match(line)) and found[1].lower() not in ("nop", "s_nop"):
            here = len(listing.opcodes)
            listing.opcodes.append(found[1])
            target = re.search(r"\.(\w+)", found[2]) if re.match(branch, found[1]) else None
            # A branch to itself is the trap that ends a kernel, not a loop.
            if target and labels.get(target[1], here) < here:
                listing.loops.append((labels[target[1]], here))
            if target:
                ahead = (target[1], here + 1) if target[1] not in labels else None
    return listing


def _count(listing: _Listing, kinds: dict[str, str]) -> MachineCode:
    patterns = {name: re.compile(pattern) for name, pattern in kinds.items()}

    def counts(opcodes: list[str]) -> dict[str, int]:
        return {name: sum(bool(p.match(o)) for o in opcodes) for name, p in patterns.items()}

    memory = [patterns[name] for name in kinds if re.search("load|store|copy|atomic", name)]

    def reaches_memory(loop: tuple[int, int]) -> bool:
        return any(p.match(o) for o in listing.opcodes[loop[0] : loop[1] + 1] for p in memory)

    # A search for what to do next is no work, if there is a loop that does some.
    working = [loop for loop in listing.loops if reaches_memory(loop)]
    first, last = _innermost(working or listing.loops)
    loop = listing.opcodes[first : last + 1]
    detours = sum(b - a + 1 for a, b in listing.detours if first <= a and b <= last)
    return MachineCode(
        instructions=len(listing.opcodes),
        loop_instructions=len(loop) - detours,
        counts=counts(listing.opcodes),
        loop_counts=counts(loop),
    )


def _innermost(loops: list[tuple[int, int]]) -> tuple[int, int]:
    """The longest loop that holds no other; an empty span without loops."""

    def holds_another(loop: tuple[int, int]) -> bool:
        return any(loop[0] <= o[0] and o[1] <= loop[1] and o != loop for o in loops)

    leaves = [loop for loop in loops if not holds_another(loop)]
    return max(leaves, key=lambda loop: loop[1] - loop[0], default=(0, -1))
