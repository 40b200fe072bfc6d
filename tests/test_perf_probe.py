"""Roofs: the kernels that find them, their machine code, and what the clocks are made into."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dlops_triton import _dispatch
from tests.tools.compile_gate import Record
from tests.tools.fixtures import shared_gate

pytest.importorskip("tqdm", reason="perf needs the extra 'perf'")

from dlops_triton.perf import machine, probe
from dlops_triton.perf.probe_kernels import barrier_kernel, fma_kernel, read_kernel

CPU = torch.device("cpu")

# --- kernels ---------------------------------------------------------------------------------


def launch(kernel: Any, grid: int, *args: Any, **settings: Any) -> None:
    _dispatch.launch(kernel, (grid,), *args, enable_fp_fusion=False, **settings)


def test_multiply_adds_are_rounded_once_and_none_is_left_out(
    kernel: torch.device, rng: np.random.Generator
) -> None:
    block, rounds, unroll = 64, 3, 4
    x = rng.standard_normal(block).astype(np.float32)
    factor, addend = np.float32(-0.99999), np.float32(0.7)
    out = torch.zeros(2, block, device=kernel)
    line = torch.tensor([factor, addend], device=kernel)
    launch(
        fma_kernel, 2, torch.from_numpy(x).to(kernel), line, out, rounds, UNROLL=unroll, BLOCK=block
    )
    want = x
    for _ in range(rounds * unroll):  # fp64 holds the product of two fp32 numbers
        want = (want.astype(np.float64) * factor + addend).astype(np.float32)
    np.testing.assert_array_equal(out.cpu().numpy(), np.stack([want, want]))


def test_a_round_of_reads_takes_a_tile_per_program_and_wraps_around(kernel: torch.device) -> None:
    tiles, block, programs, rounds = 5, 32, 3, 4
    x = torch.arange(tiles * block, dtype=torch.float32, device=kernel).view(tiles, block)
    out = torch.zeros(programs, device=kernel)
    launch(read_kernel, programs, x, out, tiles, rounds, BLOCK=block)
    sums = x.sum(1).tolist()
    want = [sum(sums[(p + i * programs) % tiles] for i in range(rounds)) for p in range(programs)]
    assert out.tolist() == want


def test_a_barrier_counts_everyone_that_arrives(kernel: torch.device) -> None:
    # The interpreter runs a grid's programs one after another, so that only one can meet itself.
    programs = 1 if _dispatch.INTERPRETED else 8
    counter, failed = (torch.zeros(1, dtype=torch.int32, device=kernel) for _ in range(2))
    launch(barrier_kernel, programs, counter, failed, 7, 10**6, launch_cooperative_grid=True)
    assert (counter.item(), failed.item()) == (7 * programs, 0)


def test_a_barrier_that_cannot_be_met_ends_and_says_so(kernel: torch.device) -> None:
    counter = torch.full((1,), -3, dtype=torch.int32, device=kernel)  # three will never come
    failed = torch.zeros(1, dtype=torch.int32, device=kernel)
    launch(barrier_kernel, 1, counter, failed, 7, 20, launch_cooperative_grid=True)
    assert (counter.item(), failed.item()) == (-2, 1)  # it left at the first barrier


@pytest.mark.skipif(not _dispatch.INTERPRETED, reason="a GPU runs both programs at once")
def test_the_second_barrier_is_not_met_by_arrivals_at_the_first(kernel: torch.device) -> None:
    counter, failed = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    launch(barrier_kernel, 2, counter, failed, 7, 20)
    # The first leaves alone; the second meets it, once, and then waits in vain.
    assert (counter.item(), failed.item()) == (3, 1)


# --- machine code ----------------------------------------------------------------------------


def launched(name: str) -> Callable[[], None]:
    """What the probe launches for a roof, for the compile gate."""

    def call() -> None:
        h100 = probe.Machine(CPU, "sm_90", cores=132, l2_bytes=50 << 20, room=0)
        with mock.patch.object(probe, "_LAUNCHES", 1):
            probe.ROOFS[name].make(h100).call()

    return call


CASES = [
    (name, launched(name))
    for name in ("instructions_per_s", "l2_bytes_per_s", "barrier_us", "launch_us")
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    """What each roof's kernel compiles to, by roof and target."""
    records = shared_gate(tmp_path_factory, "tests.test_perf_probe:CASES", ("sm_90", "gfx942"))
    return {(r.case, r.target): r for r in records}


def gated(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of what the compile gate gives."""
    return pytest.mark.xdist_group("gate")(pytest.mark.filterwarnings("default")(test))


@gated
def test_every_kernel_compiles_and_keeps_to_its_registers(compiled: Any) -> None:
    targets = ("sm_90", "gfx942")
    assert set(compiled) == {(name, t) for name, _ in CASES for t in targets}
    for record in compiled.values():
        assert not record.error, f"{record}: {record.error}"
        assert record.code.stack == record.code.spilled == 0, str(record)


@gated
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_multiply_adds_fill_their_loop(compiled: Any, target: str) -> None:
    code = compiled["instructions_per_s", target].code
    assert code.loop_counts["fma"] >= 0.9 * code.loop_instructions > 0
    if target == "sm_90":  # none of them packed, none left out: 8 numbers a thread
        assert code.loop_counts["fma"] == 8 * probe._FMA["UNROLL"]


@gated
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_l2_is_read_in_vectors_of_16_bytes(compiled: Any, target: str) -> None:
    record = compiled["l2_bytes_per_s", target]
    n = record.code.loop_counts
    assert n["load"] == n["load_128"] > 0
    assert n["async_copy" if target == "sm_90" else "shared_load"] == 0
    if target == "sm_90":
        assert "ld.global.cg" in record.ptx


@gated
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_barrier_arrives_by_an_atomic_and_does_nothing_to_local_memory(
    compiled: Any, target: str
) -> None:
    n = compiled["barrier_us", target].code.counts
    assert n["atomic"] >= 1
    assert n["local_load"] == n["local_store"] == 0


@gated
def test_an_empty_kernel_is_empty(compiled: Any) -> None:
    for target in ("sm_90", "gfx942"):
        counts = compiled["launch_us", target].code.counts
        assert not any(counts.values())


# --- roofs -----------------------------------------------------------------------------------

MIB = 1 << 20
SETTLING_MS = (8.0, 8.0, 8.0, 2.0, 2.0, 2.0)  # what the events of a roof's six samples tell
LAUNCH_S = 3e-6
SIDE, CORES = 16, 4


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU whose clocks are planted, on the CPU's memory.

    ``launches`` are those made, ``flags`` TF32 as each product of fp32 found it.
    """
    now = SimpleNamespace(
        launches=[], captured=[], flags=[], free=8 * MIB, seconds=0.0, cleared=0, on_launch=None
    )
    told = itertools.cycle(SETTLING_MS)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(now.launches)

        def synchronize(self) -> None: ...
        def elapsed_time(self, end: Event) -> float:
            assert end.at - self.at <= 1, "one call is timed, of those here that launch one kernel"
            return next(told)

    @contextlib.contextmanager
    def capturing(graph: Any) -> Iterator[None]:
        before = len(now.launches)
        yield
        now.captured.append(len(now.launches) - before)

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
        now.launches.append((kernel.fn.__name__, grid[0], args, settings))
        now.seconds += LAUNCH_S
        if now.on_launch:
            now.on_launch(kernel.fn.__name__, args)

    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if a.dtype == torch.float32:
            now.flags.append(torch.backends.cuda.matmul.allow_tf32)

    def empty_cache() -> None:
        now.cleared += 1

    properties = SimpleNamespace(multi_processor_count=CORES, L2_cache_size=64 << 10)
    for name, value in {
        "Event": Event,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": capturing,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": empty_cache,
        "mem_get_info": lambda device: (now.free, 80 << 30),
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(_dispatch, "launch", launch)
    monkeypatch.setattr(_dispatch, "gpu", lambda device: ("Invented GPU", "sm_90"))
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    for name, value in {"_SIDE": SIDE, "_SIDE_FP64": SIDE // 2, "_SHARE_S": 0.0}.items():
        monkeypatch.setattr(probe, name, value)
    return now


def measured() -> tuple[dict[str, float], dict[str, str]]:
    """The roofs, and what was said of those that are absent."""
    said: dict[str, str] = {}
    found = machine.roofs(CPU, lambda name, reason: said.update({name: reason}))
    return found, said


def test_roofs_are_what_the_settled_clocks_make_of_the_work(fake: SimpleNamespace) -> None:
    found, said = measured()
    assert not said
    room = 2 * MIB  # a quarter of what is free
    triad = room // 3 // 4 * 4
    seconds = 2e-3
    read, fma = ([x for x in fake.launches if x[0] == n] for n in ("read_kernel", "fma_kernel"))
    (_, readers, (x, _, tiles, rounds), _) = read[0]
    (_, adders, (*_, out, passes), settings) = fma[0]
    assert found == pytest.approx(
        {
            "copy_bytes_per_s": 2 * (room // 2) / seconds,
            "triad_bytes_per_s": 3 * triad / seconds,
            "l2_bytes_per_s": readers * rounds * x[0].nbytes / seconds,
            "instructions_per_s": out.numel() * passes * settings["UNROLL"] / seconds,
            **{
                f"matmul_{name}_flop_per_s": 2 * SIDE**3 / seconds
                for name in ("bf16", "fp16", "fp32", "tf32")
            },
            "matmul_fp64_flop_per_s": 2 * (SIDE // 2) ** 3 / seconds,
            "launch_us": 1e6 * LAUNCH_S,
            "graph_launch_us": 1e6 * seconds / 1000,
            "barrier_us": 1e6 * seconds / 1000,
        }
    )
    assert list(found) == list(probe.ROOFS)
    assert tiles * x[0].nbytes <= (64 << 10) // 4
    assert adders % CORES == readers % CORES == 0
    assert min(rounds, passes) > 100  # so that a launch does not count
    assert fake.captured == [1000]
    assert fake.cleared == len(found)


def test_every_launch_of_the_probe_says_what_it_must(fake: SimpleNamespace) -> None:
    measured()
    kernels = {name for name, *_ in fake.launches}
    assert kernels == {"fma_kernel", "read_kernel", "empty_kernel", "barrier_kernel"}
    for name, grid, _, settings in fake.launches:
        assert settings["enable_fp_fusion"] is False
        assert settings.get("launch_cooperative_grid", False) == (name == "barrier_kernel")
        assert grid == CORES or name != "barrier_kernel"  # all must be resident


@pytest.fixture(params=[True, False])
def allowed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What the user has said of TF32."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = request.param
    yield request.param
    settings.allow_tf32 = before


def test_only_the_tf32_product_may_use_tf32_and_the_flag_is_restored(
    fake: SimpleNamespace, allowed: bool
) -> None:
    measured()
    half = len(fake.flags) // 2
    assert fake.flags == [False] * half + [True] * half
    assert half > 0
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


def test_a_roof_that_raises_is_absent_and_told_and_leaves_the_others(
    fake: SimpleNamespace, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if torch.backends.cuda.matmul.allow_tf32:
            raise torch.OutOfMemoryError("no room for TF32")
        if a.dtype == torch.float16:
            raise RuntimeError("no fp16")

    monkeypatch.setattr(torch, "mm", mm)
    found, said = measured()
    assert said == {
        "matmul_fp16_flop_per_s": "RuntimeError: no fp16",
        "matmul_tf32_flop_per_s": "OutOfMemoryError: no room for TF32",
    }
    assert set(found) == set(probe.ROOFS) - set(said)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


def test_a_barrier_that_failed_in_any_call_is_no_roof(fake: SimpleNamespace) -> None:
    calls = 0

    def last_fails(kernel: str, args: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += kernel == "barrier_kernel"
        if kernel == "barrier_kernel" and calls == 13:  # one to warm up, two per sample
            args[1].fill_(1)

    fake.on_launch = last_fails
    found, said = measured()
    assert calls == 13
    assert "barrier_us" not in found
    assert said["barrier_us"].startswith("TimeoutError")


def test_a_roof_is_absent_where_memory_target_or_cache_do_not_allow_it(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.free = 4 * (64 << 10)
    _, said = measured()
    assert set(said) == {"copy_bytes_per_s", "triad_bytes_per_s"}  # no larger than the cache
    fake.free = 4 * 3 * 8 * (SIDE // 2) ** 2
    _, said = measured()
    small = {f"matmul_{name}_flop_per_s" for name in ("fp32", "tf32")}
    assert set(said) == {"copy_bytes_per_s", "triad_bytes_per_s"} | small

    fake.free = 8 * MIB
    for target in ("sm_75", "gfx942"):
        monkeypatch.setattr(_dispatch, "gpu", lambda device, t=target: ("", t))
        assert measured()[1] == {"matmul_tf32_flop_per_s": f"ValueError: {target} has no TF32"}
    unknown = SimpleNamespace(multi_processor_count=CORES, L2_cache_size=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: unknown)
    assert "l2_bytes_per_s" in measured()[1]


def test_sampling_ends_when_its_time_or_its_number_is_reached(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(cost_s: float) -> int:
        taken = []

        def clock(call: Callable[[], object]) -> float:
            fake.seconds += cost_s
            taken.append(cost_s)
            return cost_s

        assert probe._median_s(probe.Work(lambda: None, 1, clock)) == cost_s
        return len(taken)

    monkeypatch.setattr(probe, "_SHARE_S", 0.5)
    assert samples(3.0) == 6
    assert samples(0.0301) == 17
    assert samples(1e-4) == 200


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_shows_every_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_BUFFER", 1 << 30)
    monkeypatch.setattr(probe, "_SHARE_S", 0.0)
    device = torch.device("cuda")
    held = torch.cuda.memory_reserved(device)
    said: list[tuple[str, str]] = []
    found = machine.roofs(device, lambda *words: said.append(words))
    assert not said
    assert all(value > 0 for value in found.values())
    assert found["matmul_bf16_flop_per_s"] > found["matmul_fp32_flop_per_s"]
    assert torch.cuda.memory_reserved(device) <= held + 64 * MIB  # cuBLAS keeps its workspace
