"""torch.func, torch.vmap, torch.jit.script, copies and files of every op and module."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlops_triton
from dlops_triton import ghmc_loss, nms_padded, sigmoid_focal_loss, softmax_focal_loss
from tests.calls import CALLS, DIFFERENTIABLE, FIXED, FUNCTIONS, MODULES, OPS, Call, made, weighed

N = 5
STATELESS = {n: c for n, c in FIXED.items() if n not in ("GHMC", "GHMR")}


def assert_same(got: Any, want: Any) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


# ---- torch.func


def total_of(call: Call, called: Callable[..., Any]) -> Callable[..., Tensor]:
    """The scalar that `Call.differentiated` differentiates."""
    return lambda *tensors: weighed(call.results(called, tensors)[0])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_func_grad(name: str, quick: torch.device) -> None:
    call = DIFFERENTIABLE[name]
    leaves = call.leaves(quick, N)
    want = call.differentiated(made(call, quick), leaves)[1][: call.gradients]
    total = total_of(call, made(call, quick))
    tensors = tuple(t.detach() for t in leaves)
    got = torch.func.grad(total, tuple(range(call.gradients)))(*tensors)
    assert_same(got, want)
    if name not in STATELESS:
        return
    first, rest = tensors[: call.gradients], tensors[call.gradients :]
    value, vjp = torch.func.vjp(lambda *t: total(*t, *rest), *first)
    assert_same(vjp(2 * torch.ones_like(value)), [2 * g for g in want])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_what_torch_func_cannot_have(name: str, quick: torch.device) -> None:
    call = DIFFERENTIABLE[name]
    total = total_of(call, made(call, quick))
    tensors = tuple(t.detach() for t in call.leaves(quick, N))
    with pytest.raises(RuntimeError, match="has no forward-mode derivatives"):
        torch.func.jvp(lambda x: total(x, *tensors[1:]), tensors[:1], tensors[:1])
    twice = torch.func.grad(lambda *t: torch.func.grad(total)(*t).sum())
    with pytest.raises(RuntimeError, match="can be differentiated once only, not twice"):
        twice(*tensors)


# ---- torch.vmap


def stacked(call: Call, device: torch.device, calls: int = 3) -> list[Tensor]:
    """The tensors of several calls, the dimension that counts them last but for the first's."""
    each = [[t.detach() for t in call.leaves(device, N, seed)] for seed in range(calls)]
    together = [torch.stack(part) for part in zip(*each, strict=True)]
    return [t if i == 0 else t.movedim(0, -1) for i, t in enumerate(together)]


@pytest.mark.parametrize("name", STATELESS)
def test_vmap(name: str, device: torch.device) -> None:
    call = STATELESS[name]
    called = made(call, device)
    tensors = stacked(call, device)
    dims = tuple(0 if i == 0 else -1 for i in range(len(tensors)))
    got = torch.vmap(lambda *t: call.results(called, t), dims)(*tensors)
    rest = [t.select(-1, 0) for t in tensors[1:]]  # shared by all
    alone = torch.vmap(lambda t: call.results(called, (t, *rest)))(tensors[0])
    for i in range(3):
        one = [t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
        assert_same([t[i] for t in got], call.results(called, tuple(one)))
        assert_same([t[i] for t in alone], call.results(called, (one[0], *rest)))


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n in STATELESS])
def test_vmap_of_the_gradient(name: str, quick: torch.device) -> None:
    """Gradients sample by sample, and a batch of incoming gradients."""
    call = DIFFERENTIABLE[name]
    called = made(call, quick)
    total = total_of(call, called)
    tensors = stacked(call, quick)
    dims = tuple(0 if i == 0 else -1 for i in range(len(tensors)))
    which = tuple(range(call.gradients))
    got = torch.vmap(torch.func.grad(total, which), dims)(*tensors)
    for i in range(3):
        one = [t.select(d, i) for t, d in zip(tensors, dims, strict=True)]
        assert_same([t[i] for t in got], torch.func.grad(total, which)(*one))

    leaves = call.leaves(quick, N)
    result = call.results(called, leaves)[0]
    incoming = torch.randn(3, *result.shape, device=quick, dtype=result.dtype)
    wanted = leaves[: call.gradients]
    together = torch.vmap(lambda g: torch.autograd.grad(result, wanted, g, retain_graph=True))(
        incoming
    )
    for i in range(3):
        alone = torch.autograd.grad(result, wanted, incoming[i], retain_graph=True)
        assert_same([t[i] for t in together], alone)


def test_vmap_says_what_it_cannot_do(quick: torch.device) -> None:
    for call in FUNCTIONS.values():
        if call.data_sized:
            tensors = [t[None] for t in call.leaves(quick, N)]
            with pytest.raises(RuntimeError, match=f"depends on data: {call.data_sized} has a fix"):
                torch.vmap(made(call, quick))(*tensors)
    x, labels = torch.randn(2, 7, 5, device=quick), torch.zeros(2, 7, device=quick).long()
    counts = torch.zeros(10, device=quick)
    with pytest.raises(RuntimeError, match="momentum, whose counts are updated in place"):
        torch.vmap(lambda x, t: ghmc_loss(x, t, momentum=0.5, acc_sum=counts))(x, labels)
    assert not counts.any()
    with pytest.raises(ValueError, match=r"dlops.* needs a dimension of at least 1, got 0"):
        torch.vmap(lambda x, t: softmax_focal_loss(x, t))(x[:0], labels[:0])


def test_vmap_of_padded_detections_takes_one_launch(kernel: torch.device) -> None:
    """And of what is elementwise."""
    from tests.tools.host_cost import host_cost

    call = CALLS["nms_padded"]
    with host_cost() as cost:
        torch.vmap(lambda b, s: nms_padded(b, s, 0.5, max_output=3))(
            *(t.detach().expand(4, *t.shape) for t in call.leaves(kernel, N)[:2])
        )
    assert len(cost.launches) == 1
    with host_cost() as cost:
        torch.vmap(sigmoid_focal_loss)(
            *(t.detach().expand(4, *t.shape) for t in CALLS["sigmoid_focal_loss"].leaves(kernel, N))
        )
    assert len(cost.launches) == 1


# ---- torch.jit.script


def of_a_user(source: str, folder: Path) -> Callable[..., Any]:
    """The function ``mine`` in a file, since torch.jit.script reads the source."""
    file = folder / f"of_a_user_{len(source)}.py"
    file.write_text(f"import torch\nimport dlops_triton\nfrom torch import Tensor\n\n{source}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mine  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("name", sorted(OPS))
def test_script_of_a_function(name: str, tmp_path: Path) -> None:
    match = rf"torch.jit.script does not take dlops_triton.{name}: use torch.compile, or torch.exp"
    with pytest.raises(RuntimeError, match=match):
        torch.jit.script(getattr(dlops_triton, name))
    with pytest.raises(RuntimeError, match=match):
        torch.jit.script(
            of_a_user(
                f"def mine(a: Tensor) -> Tensor:\n    return dlops_triton.{name}(a, a)\n", tmp_path
            )
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("name", MODULES)
def test_script_of_a_module(name: str) -> None:
    match = rf"torch.jit.script does not take dlops_triton.nn.{name}: use torch.compile, or torch.e"
    module = MODULES[name].make()
    for one in (module, nn.Sequential(nn.Identity(), module)):
        with pytest.raises(RuntimeError, match=match):
            torch.jit.script(one)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_scripted_function_calls_back(quick: torch.device, tmp_path: Path) -> None:
    """What the message says: by a function of one's own that is ignored."""
    source = """
@torch.jit.ignore
def in_python(a: Tensor, b: Tensor) -> Tensor:
    return dlops_triton.sigmoid_focal_loss(a, b)

def mine(a: Tensor, b: Tensor) -> Tensor:
    return in_python(a * 2, b)
"""
    x, labels = CALLS["sigmoid_focal_loss"].leaves(quick, N)
    got = torch.jit.script(of_a_user(source, tmp_path))(x, labels)
    assert torch.equal(got, sigmoid_focal_loss(x * 2, labels))
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert_same([gradient], torch.autograd.grad(sigmoid_focal_loss(x * 2, labels).sum(), x))


# ---- modules


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """A copy goes on from where the module is, without touching it."""
    call = MODULES[name]
    module = made(call, "cpu")
    assert isinstance(module, nn.Module)
    call.differentiated(module, call.leaves("cpu", N))  # GHM's state is no longer that at first
    other = duplicate(module)
    assert repr(other) == repr(module)
    state = copy.deepcopy(module.state_dict())
    got = call.differentiated(other, call.leaves("cpu", N, 1))
    assert_same(module.state_dict().values(), state.values())
    want = call.differentiated(module, call.leaves("cpu", N, 1))
    assert_same((*got[0], *got[1]), (*want[0], *want[1]))
    assert_same(other.state_dict().values(), module.state_dict().values())


@pytest.mark.parametrize("name", MODULES)
def test_state_through_a_file(name: str) -> None:
    call = MODULES[name]
    module = made(call, "cpu")
    assert isinstance(module, nn.Module)
    call.differentiated(module, call.leaves("cpu", N))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = call.make()
    assert isinstance(other, nn.Module)
    other.load_state_dict(torch.load(file, weights_only=True))
    want = call.differentiated(module, call.leaves("cpu", N, 1))
    got = call.differentiated(other, call.leaves("cpu", N, 1))
    assert_same((*got[0], *got[1]), (*want[0], *want[1]))
    assert_same(other.state_dict().values(), module.state_dict().values())
