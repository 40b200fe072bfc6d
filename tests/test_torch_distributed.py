"""Two ranks: DistributedDataParallel, fully_shard and DTensor, op by op."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlops_triton import _dispatch
from tests.calls import CALLS, DIFFERENTIABLE, Call, made, weighed

ROOT = Path(__file__).parents[1]
RANKS = 2
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

# What DTensors are taken by: losses that are sums over rows.
SHARDED = [name for name in CALLS if "_loss" in name or name in ("GHMC", "GHMR")]


COMPILED = ("sigmoid_focal_loss", "ghmc_loss")


class Scaled(nn.Module):
    """A call of tensors that parameters multiply, so that every op has what can be trained."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call
        self.called = made(call, "cpu")
        self.scales = nn.ParameterList(torch.linspace(0.8, 1.2, 4) for _ in range(call.gradients))

    def forward(self, *tensors: Tensor) -> Tensor:
        scaled = [t * s.mean() for t, s in zip(tensors, self.scales, strict=False)]
        result = self.call.results(self.called, (*scaled, *tensors[len(scaled) :]))[0]
        return weighed(result)


def batch(call: Call, rank: int) -> list[Tensor]:
    """A rank's tensors; ranks differ in size as well."""
    return [t.detach() for t in call.leaves("cpu", (5, 3)[rank], seed=rank)]


def step(model: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    """The parameters after a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*tensors).backward()
    optimizer.step()
    return {
        name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in model.named_parameters()
    }


# ---- what a rank does


def distributed_data_parallel(name: str, rank: int) -> dict[str, Tensor]:
    call = DIFFERENTIABLE[name]
    return step(nn.parallel.DistributedDataParallel(Scaled(call)), batch(call, rank))


def fully_sharded(name: str, rank: int) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    call = DIFFERENTIABLE[name]
    model = Scaled(call)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (RANKS,)))
    return step(model, batch(call, rank))


def dtensor(name: str, rank: int) -> dict[str, Any]:
    """Results and gradients, of tensors that are sharded by rows, and of ones that are not."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    call = CALLS[name]
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {}
    for kind, placement in (("sharded", Shard(0)), ("replicated", Replicate())):
        leaves = [
            distribute_tensor(t.detach(), mesh, [placement]).requires_grad_(t.requires_grad)
            for t in call.leaves("cpu", 7)
        ]
        result = made(call, "cpu")(*leaves)
        assert isinstance(result, DTensor)
        found[f"{kind} as"] = str(result.placements[0])
        whole = result.full_tensor()
        wanted = leaves[: call.gradients]
        gradients = torch.autograd.grad(weighed(whole), wanted)
        found[kind] = (whole.detach(), *(g.full_tensor() for g in gradients))
        if name in COMPILED:
            compiled = torch.compile(made(call, "cpu"), fullgraph=True, backend="aot_eager")
            again = compiled(*leaves)
            assert again.placements == result.placements
            found[f"{kind}, compiled"] = (
                again.full_tensor().detach(),
                *(
                    g.full_tensor()
                    for g in torch.autograd.grad(weighed(again.full_tensor()), wanted)
                ),
            )
        if not result.dim():  # a loss is differentiated as it is
            result = made(call, "cpu")(*leaves)
            found[f"{kind}, at once"] = [
                g.full_tensor() for g in torch.autograd.grad(result, wanted)
            ]
    return found


def refusals() -> list[str]:
    """What is said of DTensors that are no rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from dlops_triton import complete_box_iou_loss, sigmoid_focal_loss

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    x, labels = (t.detach() for t in CALLS["sigmoid_focal_loss"].leaves("cpu", 6))
    rows, columns = (distribute_tensor(x, mesh, [Shard(dim)]) for dim in (0, 1))
    said = []
    for call in (
        lambda: sigmoid_focal_loss(columns, distribute_tensor(labels, mesh, [Replicate()])),
        lambda: sigmoid_focal_loss(rows, labels),
        lambda: complete_box_iou_loss(x[:, :4], rows),
    ):
        try:
            said.append(str(call()))
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    found: dict[str, Any] = {"refusals": refusals()}
    for do, names in (
        (distributed_data_parallel, DIFFERENTIABLE),
        (fully_sharded, DIFFERENTIABLE),
        (dtensor, CALLS),
    ):
        for name in names:
            try:
                found[f"{do.__name__} {name}"] = do(name, rank)
            except Exception as error:  # the parent compares it
                found[f"{do.__name__} {name}"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found. On the reference: what runs an op is below all this."""
    folder = tmp_path_factory.mktemp("ranks")
    program = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.test_torch_distributed import worker\n"
        "worker(int(sys.argv[1]), sys.argv[2])\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), str(folder)], env=env, cwd=ROOT)
        for rank in range(RANKS)
    ]
    try:
        assert [p.wait(timeout=300) for p in processes] == [0, 0]
    finally:
        for p in processes:
            p.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


# ---- and what that has to be


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")


@pytest.mark.parametrize("wrapped", [distributed_data_parallel, fully_sharded])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_training(wrapped: Any, name: str, ranks: list[dict[str, Any]]) -> None:
    """A step of two ranks is that of one process that has both batches."""
    call = DIFFERENTIABLE[name]
    models = [Scaled(call) for _ in range(RANKS)]  # of GHM the state, which is a rank's own
    for rank, model in enumerate(models):
        (model(*batch(call, rank)) / RANKS).backward()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        one.grad += other.grad
    torch.optim.SGD(models[0].parameters(), lr=0.1).step()
    for found in ranks:
        got = found[f"{wrapped.__name__} {name}"]
        assert isinstance(got, dict), got
        assert len(got) == len(list(models[0].parameters()))
        for parameter, want in models[0].named_parameters():
            torch.testing.assert_close(got[parameter], want.detach())


@pytest.mark.parametrize("name", SHARDED)
def test_losses_of_dtensors(name: str, ranks: list[dict[str, Any]]) -> None:
    call = CALLS[name]
    leaves = call.leaves("cpu", 7)
    result, gradients = call.differentiated(made(call, "cpu"), leaves)
    once = call.results(made(call, "cpu"), leaves)[0]
    for found in ranks:
        got = found[f"dtensor {name}"]
        assert isinstance(got, dict), got
        for kind in ("sharded", "replicated"):
            for way in (kind, f"{kind}, compiled") if name in COMPILED else (kind,):
                for x, y in zip(got[way], (*result, *gradients[: call.gradients]), strict=True):
                    torch.testing.assert_close(x, y)
            if not once.dim():
                want = torch.autograd.grad(once, leaves[: call.gradients], retain_graph=True)
                for x, y in zip(got[f"{kind}, at once"], want, strict=True):
                    torch.testing.assert_close(x, y)
        assert got["sharded as"] in ("S(0)", "P(sum)", "Shard(dim=0)", "Partial(sum)")
        assert got["sharded as"].startswith("S") == bool(once.dim())
        assert got["replicated as"].startswith("R")


@pytest.mark.parametrize("name", [name for name in CALLS if name not in SHARDED])
def test_others_say_what_to_do_with_dtensors(name: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        said = found[f"dtensor {name}"]
        if name.endswith("Pack"):  # whose own convolution, torch's, comes first
            assert "mixed torch.Tensor and DTensor" in said
        else:
            assert "must be a tensor of this process, got a DTensor: pass" in said
            assert ".full_tensor(), or" in said


def test_dtensors_that_are_no_rows(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        columns, mixed, second = found["refusals"]
        assert "ValueError: inputs must be a DTensor that is Replicate() or Shard() of" in columns
        assert "TypeError: targets must be a DTensor, as inputs is, got Tensor" in mixed
        assert "TypeError: boxes2 must be a tensor of this process, got a DTensor" in second


def test_a_strided_shard_is_refused() -> None:
    """Of which labels in order, and not in the order of the logits, would be taken."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    from dlops_triton._distributed import Rows

    for placement, refused in ((_StridedShard(0, split_factor=2), True), (Shard(0), False)):
        t = SimpleNamespace(dim=lambda: 2, device_mesh=None, placements=[placement])
        with pytest.raises(ValueError, match=r"\(_StridedShard") if refused else nullcontext():
            Rows("inputs", t, -1)
