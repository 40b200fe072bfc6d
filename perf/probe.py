"""Roofs: the best rate that some plain work reaches, measured in the run that they are used in.

The data are random: zeros draw less power, and so clock higher. Every rate is a median, over
samples that begin once the clocks have settled.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlops_triton import _dispatch

from .gpus import MIB, Gpu
from .probe_kernels import barrier_kernel, empty_kernel, fma_kernel, read_kernel
from .rows import Row

Call = Callable[[], object]

_BUFFER = 4 << 30  # bytes at most, of each that is copied
_SIDE = 8192  # of the square matrices that are multiplied
_SIDE_FP64 = 4096  # which most GPUs are slow at
_LAUNCHES = 1000
_BARRIERS = 1000
_POLLS = 1 << 16  # looks at a barrier, some hundredths of a second; then its roof is given up
_SAMPLES = (6, 200)  # at least and at most
_SHARE_S = 0.5  # after the least number, sampling ends once it took so long

_FMA = {"UNROLL": 32, "BLOCK": 1024, "num_warps": 4}
_READ = {"BLOCK": 4096, "num_warps": 4}


@dataclass(frozen=True)
class Machine:
    """What the measurement of a roof needs to know of a GPU."""

    device: torch.device
    target: str
    cores: int  # SMs or CUs
    l2_bytes: int
    room: int  # bytes that a roof may take


def _by_events(call: Call) -> float:
    """The device's time of one call, queued while another keeps it busy: the host's is hidden."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _by_the_wall(call: Call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Work:
    """A call, and how much it does of what its roof counts."""

    call: Call
    amount: float
    clock: Callable[[Call], float] = _by_events
    check: Callable[[], None] = lambda: None  # raises if a call has failed


def roofs(device: torch.device, say: Callable[[str, str], None] = lambda name, reason: None) -> Row:
    """Measure every roof, in some ten seconds and a quarter of the memory that is free.

    Bytes of copies and triads are those read and those written, of the L2 those read. Launches go
    through the library's own launcher and are the caller's time; the other clocks are the device's.
    A barrier is one of as many programs of 4 warps as there are cores.

    Args:
        say: is told of each roof that cannot be measured, and why; it is absent from the result.

    Returns:
        Rates per second, and times in microseconds, by the names of ``ROOFS``.
    """
    properties = torch.cuda.get_device_properties(device)
    machine = Machine(
        device,
        target=_dispatch.gpu(device)[1],
        cores=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        room=torch.cuda.mem_get_info(device)[0] // 4,
    )
    found: Row = {}
    with torch.cuda.device(device):
        for name, roof in ROOFS.items():
            try:
                found[name] = _rate(name, roof.make(machine))
            except Exception as e:  # whatever a GPU lacks must not end the run
                say(name, f"{type(e).__name__}: {str(e).strip()[:200]}")
            finally:
                torch.cuda.empty_cache()
    return found


def _rate(name: str, work: Work) -> float:
    seconds = _median_s(work)
    work.check()
    if name.endswith("_us"):
        return round(1e6 * seconds / work.amount, 3)
    return round(work.amount / seconds)


def _median_s(work: Work) -> float:
    """The median of the later half of the samples; during the first, the clocks settle."""
    work.call()  # may compile
    torch.cuda.synchronize()
    least, most = _SAMPLES
    start = time.perf_counter()
    samples: list[float] = []
    while len(samples) < least or (len(samples) < most and time.perf_counter() - start < _SHARE_S):
        samples.append(work.clock(work.call))
    return float(np.median(samples[len(samples) // 2 :]))


def _buffers(m: Machine, count: int) -> list[Tensor]:
    size = min(_BUFFER, m.room // count)
    if size < 8 * m.l2_bytes:
        raise MemoryError(f"{size / MIB:.0f} MiB is the most per buffer, too little beside the L2")
    return [torch.randn(size // 4, device=m.device) for _ in range(count)]


def _copy(m: Machine) -> Work:
    source, out = _buffers(m, 2)
    return Work(lambda: out.copy_(source), amount=2 * out.nbytes)


def _triad(m: Machine) -> Work:
    out, b, c = _buffers(m, 3)
    return Work(lambda: torch.add(b, c, alpha=3.0, out=out), amount=3 * out.nbytes)


def _read(m: Machine) -> Work:
    """A quarter of the L2, which stays there even where each half of a GPU keeps its own copy.

    In a round the programs read different tiles, as far as there are enough: a cache that answers
    two requests by one look would seem faster than it is.
    """
    tile = _READ["BLOCK"]
    tiles = m.l2_bytes // 4 // (4 * tile)
    if tiles == 0:
        raise ValueError(f"an L2 of {m.l2_bytes} bytes is too small, or its size is not known")
    programs, rounds = 4 * m.cores, 512
    x = torch.randn(tiles, tile, device=m.device)
    out = torch.empty(programs, device=m.device)

    def call() -> None:
        _dispatch.launch(
            read_kernel, (programs,), x, out, tiles, rounds, enable_fp_fusion=False, **_READ
        )

    return Work(call, amount=programs * rounds * tile * 4)


def _fma(m: Machine) -> Work:
    """Every multiply-add of a lane counts, also where a compiler packs two in an instruction."""
    programs, rounds = 16 * m.cores, 800
    block = _FMA["BLOCK"]
    x = torch.randn(block, device=m.device)
    # The numbers keep swinging around the addend's half, and so their bits keep changing.
    line = torch.tensor([-0.99999, 0.7], device=m.device)
    out = torch.empty(programs, block, device=m.device)

    def call() -> None:
        _dispatch.launch(
            fma_kernel, (programs,), x, line, out, rounds, enable_fp_fusion=False, **_FMA
        )

    return Work(call, amount=programs * block * rounds * _FMA["UNROLL"])


def _matmul(m: Machine, dtype: torch.dtype, tf32: bool = False) -> Work:
    if tf32 and not (m.target.startswith("sm_") and int(m.target.removeprefix("sm_")) >= 80):
        raise ValueError(f"{m.target} has no TF32")
    side = _SIDE_FP64 if dtype == torch.float64 else _SIDE
    if 3 * side**2 * dtype.itemsize > m.room:
        raise MemoryError(f"three matrices of {side} x {side} are more than may be taken")
    a, b = (torch.randn(side, side, dtype=dtype, device=m.device) for _ in range(2))
    out = torch.empty_like(a)

    def call() -> None:
        with _tf32(tf32):
            torch.mm(a, b, out=out)

    return Work(call, amount=2 * side**3)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = allowed
    try:
        yield
    finally:
        settings.allow_tf32 = before


def _launches(m: Machine) -> Work:
    x = torch.empty(1, device=m.device)

    def call() -> None:
        for _ in range(_LAUNCHES):
            _dispatch.launch(empty_kernel, (1,), x, enable_fp_fusion=False)

    return Work(call, amount=_LAUNCHES, clock=_by_the_wall)


def _graph(m: Machine) -> Work:
    launches = _launches(m)
    launches.call()  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches.call()
    return Work(graph.replay, amount=launches.amount)


def _barrier(m: Machine) -> Work:
    counter, failed = (torch.zeros(1, dtype=torch.int32, device=m.device) for _ in range(2))

    def call() -> None:
        counter.zero_()  # a launch among a thousand barriers
        _dispatch.launch(
            barrier_kernel,
            (m.cores,),
            counter,
            failed,
            _BARRIERS,
            _POLLS,
            enable_fp_fusion=False,
            num_warps=4,
            launch_cooperative_grid=True,
        )

    def check() -> None:
        if failed.item():
            raise TimeoutError(f"a program looked {_POLLS} times, and not all others had come")

    return Work(call, amount=_BARRIERS, check=check)


@dataclass(frozen=True)
class Roof:
    words: str
    make: Callable[[Machine], Work]
    maker_says: Callable[[Gpu], float] | None = None


ROOFS: dict[str, Roof] = {
    "copy_bytes_per_s": Roof("copy, read and written", _copy, lambda g: g.dram_bytes_per_s),
    "triad_bytes_per_s": Roof(
        "triad a = b + s c, read and written", _triad, lambda g: g.dram_bytes_per_s
    ),
    "l2_bytes_per_s": Roof("L2, read", _read),
    "instructions_per_s": Roof("fp32 multiply-adds", _fma, lambda g: g.instructions_per_s),
    **{
        f"matmul_{name}_flop_per_s": Roof(
            f"matrix product, {name}",
            functools.partial(_matmul, dtype=dtype, tf32=name == "tf32"),
            None if name == "fp64" else functools.partial(Gpu.matmul_flop_per_s, precision=name),
        )
        for name, dtype in {
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
            "fp32": torch.float32,
            "tf32": torch.float32,
            "fp64": torch.float64,
        }.items()
    },
    "launch_us": Roof("kernel launch, eager", _launches),
    "graph_launch_us": Roof("kernel in a CUDA graph", _graph),
    "barrier_us": Roof("grid barrier", _barrier),
}
