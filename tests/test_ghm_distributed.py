"""GHM over two ranks is GHM over their joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dlops_triton import _dispatch, ghmc_loss, ghmr_loss
from dlops_triton.nn import GHMC

ROOT = Path(__file__).parents[1]
RANKS = 2
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")


def batch(rank: int) -> tuple[torch.Tensor, ...]:
    """Logits, labels, row weights and boxes' weights; ranks differ in size and distribution."""
    g = torch.Generator().manual_seed(rank)
    n = (30, 17)[rank]
    x = torch.randn(n, 6, generator=g) * (1 + 2 * rank) - rank
    labels = torch.randint(-1, 7, (n,), generator=g)
    w = torch.rand(n, generator=g) - 0.3
    return x, labels, w, torch.rand(n, 6, generator=g)


def losses(
    x: torch.Tensor, labels: torch.Tensor, w: torch.Tensor, u: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Losses, gradients and states of two steps; of every kind that has its own path."""
    acc, steps = torch.zeros(10), torch.zeros(10, dtype=torch.int64)
    x = x.requires_grad_()
    found: list[torch.Tensor] = []
    for _ in range(2):
        for loss in (
            ghmc_loss(x, labels, w, momentum=0.75, acc_sum=acc, bias_correction=steps,
                      process_group=group),
            ghmc_loss(x, labels, bins=30, process_group=group),
            ghmr_loss(x / 30, torch.zeros_like(x), u, process_group=group),
            GHMC(process_group=group)(x.double(), labels, w),
        ):  # fmt: skip
            found += [loss.detach(), torch.autograd.grad(loss, x)[0]]
    # A rank without elements takes part, and gets nothing.
    none = slice(0, 0 if group and dist.get_rank() else None)
    found += [ghmc_loss(x[none], labels[none], process_group=group).detach()]
    return (*found, acc, steps)


def worker(rank: int, implementation: str, folder: str) -> None:
    _dispatch.cpu_implementation = implementation
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    torch.save(losses(*batch(rank), dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_two_ranks_are_one(
    implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "kernel" and not _dispatch.INTERPRETED:
        pytest.skip("CPU tensors have kernels in the interpreter only")
    program = (
        "import sys\n"
        "from tests.tools import interpreter\n"
        "from dlops_triton import _dispatch\n"
        "if _dispatch.INTERPRETED: interpreter.install_fixes()\n"
        "from tests.test_ghm_distributed import worker\n"
        "worker(int(sys.argv[1]), *sys.argv[2:])\n"
    )
    # The variable must be there before Triton is imported.
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if implementation == "kernel":
        env["TRITON_INTERPRET"] = "1"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), implementation, str(tmp_path)],
            env=env,
            cwd=ROOT,
        )
        for rank in range(RANKS)
    ]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    monkeypatch.setattr(_dispatch, "cpu_implementation", implementation)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    batches = [batch(rank) for rank in range(RANKS)]
    joined = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
    *whole, want_acc, want_steps = losses(*joined, None)  # type: ignore[arg-type]
    for part in parts:
        torch.testing.assert_close(part[-2], want_acc)
        assert torch.equal(part[-1], want_steps)
    assert want_steps.max() == 2
    for i, want in enumerate(whole[:-1]):
        a, b = (part[i] for part in parts)
        if want.dim():
            torch.testing.assert_close(torch.cat([a, b]), want)
        else:
            torch.testing.assert_close(a + b, want)
    torch.testing.assert_close(
        parts[0][-3], ghmc_loss(batches[0][0], batches[0][1]).detach()
    )  # fmt: skip
    assert parts[1][-3] == 0
