"""GHM inside torch: autograd, compilation, cost, rejected arguments, and the modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dlops_triton import _dispatch, ghmc_loss, ghmr_loss
from dlops_triton.nn import GHMC, GHMR
from dlops_triton.reference import ghm as reference
from tests.test_ghm import DTYPES, loss_of
from tests.tools.host_cost import host_cost
from tests.tools.interpreter import shuffled
from tests.tools.traffic import traffic

HALF, FLOAT, DOUBLE = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("mu", [None, 0.5])
def test_gradcheck(mu: float | None, device: torch.device) -> None:
    x = torch.randn(4, 3, dtype=DOUBLE, device=device, requires_grad=True)
    labels = torch.tensor([0, 3, -1, 2], device=device)
    soft = torch.rand(4, 3, dtype=DOUBLE, device=device)
    w = torch.tensor([1.0, 0, 2, 1], device=device)
    for t in (labels, soft) if mu is None else (soft,):
        for reduction in ("none", "sum", "mean"):
            assert torch.autograd.gradcheck(
                lambda x, t=t, r=reduction: loss_of(mu, x, t, w, reduction=r), (x,), fast_mode=True
            )


@pytest.mark.parametrize("mu", [None, 0.02])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_double_backward(
    mu: float | None, dtype: torch.dtype, reduction: str, device: torch.device
) -> None:
    x = torch.randn(30, 5, device=device).to(dtype).requires_grad_()
    t = torch.arange(30, device=device) % 6 if mu is None else torch.zeros_like(x)
    acc = torch.zeros(10, device=device)
    loss = loss_of(mu, x, t, momentum=0.5, acc_sum=acc, reduction=reduction)
    once = acc.clone()
    g = torch.full_like(loss, 3)
    grads = [torch.autograd.grad(loss, x, g, retain_graph=True)[0] for _ in range(3)]
    assert all(torch.equal(grads[0], other) for other in grads[1:])
    (unit,) = torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    torch.testing.assert_close(grads[0], 3 * unit)
    assert torch.equal(acc, once)
    (grad,) = torch.autograd.grad(loss, x, g, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        grad.sum().backward()


@pytest.mark.parametrize("mu", [None, 0.02])
def test_order_of_programs_does_not_matter(mu: float | None, kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("program order can be chosen in the interpreter only")
    x, w = torch.randn(300, 80, requires_grad=True), torch.rand(300)
    t = torch.randint(0, 81, (300,)) if mu is None else torch.zeros(300, 80)

    def run() -> list[Tensor]:
        acc = torch.zeros(10)
        loss = loss_of(mu, x, t, w, momentum=0.5, acc_sum=acc)
        return [loss, *torch.autograd.grad(loss, x), acc]

    want = run()
    for seed in range(3):
        with shuffled(seed):
            got = run()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mu", [None, 0.02])
def test_counters_are_left_at_0(
    mu: float | None, kernel: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's next launch finds them as this one leaves them."""
    kept: dict[int, Tensor] = {}

    def counter(device: torch.device, size: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
        return kept.setdefault(size, torch.zeros(size, dtype=dtype, device=device))

    monkeypatch.setattr(_dispatch, "counter", counter)
    x = torch.randn(40, 80, device=kernel)
    t = torch.arange(40, device=kernel) if mu is None else torch.zeros_like(x)
    first = loss_of(mu, x, t)
    assert sorted(kept) == [1, 17]
    assert not any(bool(c.any()) for c in kept.values())
    assert torch.equal(loss_of(mu, x, t), first)


@pytest.mark.parametrize("mu", [None, 0.02])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_launches_and_synchronisations(
    mu: float | None, reduction: str, kernel: torch.device
) -> None:
    x = torch.randn(20, 5, device=kernel, requires_grad=True)
    t = torch.arange(20, device=kernel) % 6 if mu is None else torch.zeros(20, 5, device=kernel)
    w, acc = torch.ones(20, device=kernel), torch.zeros(30, device=kernel)
    with host_cost() as cost:
        loss = loss_of(mu, x, t, w, bins=30, momentum=0.5, acc_sum=acc, reduction=reduction)
    assert len(cost.launches) == 2
    assert cost.synchronisations == []
    g = torch.ones_like(loss)
    with host_cost() as cost:
        loss.backward(g)
    assert len(cost.launches) == 1
    assert cost.synchronisations == []


def test_labels_of_rows_are_read_once_a_row(kernel: torch.device) -> None:
    """Also with weights expanded over the classes, as mmdet expands them."""
    x, t = torch.randn(20, 5, device=kernel), torch.arange(20, device=kernel)
    for w in (None, torch.ones(20, device=kernel)[:, None].expand(20, 5)):
        with host_cost() as cost:
            ghmc_loss(x, t, w)
        assert cost.launches == ["ghm_count_rows_kernel", "ghm_loss_rows_kernel"]


@pytest.mark.unmetered
@pytest.mark.parametrize("weighted", [False, True])
def test_traffic(weighted: bool, kernel: torch.device) -> None:
    if kernel.type != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    n, c = 2000, 80
    x = torch.randn(n, c).sub(4).bfloat16().requires_grad_()
    t = torch.randint(-1, c + 1, (n,))
    w = torch.ones(n) if weighted else None
    with traffic(sectors=True) as meter:
        ghmc_loss(x, t, w).backward()
    assert meter.out_of_bounds == 0
    least = 3 * n * c * 2 + 2 * n * (12 if weighted else 8)
    assert least <= meter.dram <= 1.05 * least


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, t: Tensor, w: Tensor, acc: Tensor) -> Tensor:
        a = ghmc_loss(x * 2, t, w, bins=30)
        b = ghmc_loss(x * 2, t, w, momentum=0.75, acc_sum=acc)
        return a + b + ghmr_loss(x, x.detach() + 1, reduction="none").mean()

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (20, 33):
        x = torch.randn(n, 5, device=device, requires_grad=True)
        t, w = torch.arange(n, device=device) % 6, torch.rand(n, device=device) - 0.2
        results = []
        for f in (step, compiled):
            acc = torch.ones(10, device=device)
            loss = f(x, t, w, acc)
            results.append((loss, *torch.autograd.grad(loss, x), acc))
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q)
        assert not torch.equal(results[1][2], torch.ones(10, device=device))


def test_opcheck(device: torch.device) -> None:
    x, labels = torch.randn(9, 5, device=device), torch.arange(9, device=device) % 6
    w, acc = torch.rand(9, device=device), torch.ones(10, device=device)
    steps = torch.ones(10, dtype=torch.int64, device=device)
    ops = torch.ops.dlops
    table = ops.ghm_table(x, labels, w, None, 10)
    totals = ops.ghm_totals(x, labels, w, None, 10)
    for op, arguments in (
        (ops.ghm_table.default, (x, x.mT.contiguous().mT, w, 0.02, 10)),
        (ops.ghm_averaged_table.default, (x, labels, w, acc, steps, None, 10, 0.5, True)),
        (ops.ghm_averaged_table.default, (x, labels, w, acc, None, None, 10, 0.5, False)),
        (ops.ghm_totals.default, (x.double(), labels, None, None, 10)),
        (ops.ghm_table_from.default, (totals, None, 10, False)),
        (
            ops.ghm_averaged_table_from.default,
            (totals, acc, steps, None, 10, 0.5, True, True),
        ),
        (ops.ghm_loss.default, (x, labels, w, table, table[-1], 1.0, None, 10, True, True)),
        (ops.ghm_loss.default, (x.mT, x.mT, None, table, None, 1.0, 0.1, 10, False, False)),
        (ops.ghm_bwd.default, (x.mT, x.mT, x.mT, None, table, 1.0, 0.1, 10)),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": [1.0]}, TypeError, "pred must be a torch.Tensor, got list"),
        ({"pred": torch.zeros(4, 3).long()}, TypeError, "pred .*got torch.int64"),
        ({"target": torch.zeros(4)}, TypeError, r"target \(of labels\) .*got torch.float32"),
        ({"target": torch.zeros(5).long()}, ValueError, r"\(4,\), got \(5,\)"),
        (
            {"target": torch.zeros(4, 2)},
            ValueError,
            r"\(4, 3\) or, of labels, \(4,\), got \(4, 2\)",
        ),
        ({"target": torch.zeros(4, 3, device="meta")}, ValueError, "device of pred, cpu, got meta"),
        ({"target": torch.zeros(4, 3, requires_grad=True)}, ValueError, "target must not require"),
        ({"label_weight": torch.ones(3)}, ValueError, r"\(4,\) or \(4, 3\), got \(3,\)"),
        ({"label_weight": 1.0}, TypeError, "label_weight must be a torch.Tensor, got float"),
        ({"bins": 0}, ValueError, r"bins must be an integer in \[1, 128\], got 0"),
        ({"bins": 10.0}, TypeError, "bins must be an integer .*got 10.0"),
        ({"momentum": 1}, ValueError, r"momentum must be in \[0, 1\), got 1"),
        ({"momentum": 0.5}, ValueError, r"acc_sum must be a tensor of \[10\] .*0.5, got None"),
        ({"acc_sum": torch.zeros(9)}, ValueError, r"acc_sum .*\(10,\), got \(9,\)"),
        ({"acc_sum": torch.zeros(20)[::2]}, ValueError, r"acc_sum .*strides \(2,\)"),
        ({"acc_sum": torch.zeros(10).half()}, TypeError, "acc_sum .*got torch.float16"),
        ({"acc_sum": torch.zeros(10, requires_grad=True)}, ValueError, "acc_sum must not require"),
        ({"bias_correction": torch.zeros(10)}, TypeError, "bias_correction .*got torch.float32"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', .*got 'avg'"),
        ({"loss_weight": math.nan}, ValueError, "loss_weight must be finite, got nan"),
        ({"avg_factor": 0}, ValueError, "avg_factor must be above 0 and finite, got 0"),
        ({"avg_factor": 1.0, "reduction": "sum"}, ValueError, "needs reduction='mean', .*'sum'"),
        ({"avg_factor": torch.ones(2)}, ValueError, r"one element, got shape \(2,\)"),
        ({"process_group": 3}, TypeError, "process_group must be .*got int"),
    ],
)
def test_rejected(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"pred": torch.zeros(4, 3), "target": torch.zeros(4, 3)}
    with pytest.raises(error, match=message):
        ghmc_loss(**(arguments | change))


def test_ghmr_rejects() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"mu must be in \[1e-30, 1e30\], got 0"):
        ghmr_loss(x, x, mu=0)
    with pytest.raises(ValueError, match=r"target .*\(4, 3\), got \(4,\)"):
        ghmr_loss(x, torch.zeros(4))
    with pytest.raises(TypeError, match=r"target .*got torch.int64"):
        ghmr_loss(x, x.long())


# ---- modules


@pytest.mark.parametrize("module", [GHMC, GHMR])
def test_state_is_mmdets(module: type[GHMC | GHMR]) -> None:
    assert list(module().state_dict()) == ["edges"]
    with_momentum = module(bins=30, momentum=0.75)
    state = with_momentum.state_dict()
    assert list(state) == ["edges", "acc_sum"]
    assert state["edges"].tolist() == reference.edges(
        30, None if module is GHMC else 0.02
    ).tolist()  # fmt: skip
    theirs = {"edges": state["edges"].clone(), "acc_sum": torch.arange(30.0)}
    with_momentum.load_state_dict(theirs)
    assert with_momentum.acc_sum is not None
    assert torch.equal(with_momentum.acc_sum, torch.arange(30.0))
    for convert in (module.half, module.bfloat16, module.double, lambda m: m.to(HALF)):
        m = module(momentum=0.5)
        assert convert(m) is m
        assert m.edges.dtype == FLOAT
        assert m.acc_sum is not None
        assert m.acc_sum.dtype == FLOAT
    assert m.to("meta").edges.device.type == "meta"
    assert list(module(momentum=0.5, bias_correction=True).state_dict())[-1] == "steps"
    assert "momentum=0.5" in repr(m)


@pytest.mark.parametrize("mu", [None, 0.1])
def test_modules_call_the_functions(mu: float | None, device: torch.device) -> None:
    options: dict[str, Any] = {"bins": 30, "momentum": 0.75, "loss_weight": 2.0}
    module = (GHMC(**options) if mu is None else GHMR(mu, **options)).to(device)
    acc = torch.zeros(30, device=device)
    x = torch.randn(8, 5, device=device)
    t, w = torch.zeros(8, 5, device=device), torch.ones(8, 5, device=device)
    for _ in range(2):
        want = loss_of(mu, x, t, w, acc_sum=acc, **options)
        assert torch.equal(module(x, t, w), want)
        assert torch.equal(module.acc_sum, acc)
    each = module(x, t, w, reduction_override="none")
    assert each.shape == x.shape
    assert not torch.equal(module.acc_sum, acc)
    # In evaluation and without gradients the state rests, and the loss is what it would be.
    rests = module.acc_sum.clone()
    want = loss_of(mu, x, t, w, acc_sum=rests.clone(), **options)
    for training, grad in ((False, True), (True, False)):
        module.train(training)
        with torch.set_grad_enabled(grad):
            assert torch.equal(module(x, t, w), want)
        assert torch.equal(module.acc_sum, rests)
    module.eval()
    if isinstance(module, GHMC):
        assert torch.equal(module(x, t, w, avg_factor=3.0), want)
        with pytest.raises(ValueError, match="use_sigmoid must be True, got False"):
            GHMC(use_sigmoid=False)
    else:
        torch.testing.assert_close(module(x, t, w, 20.0), want * 2)
        torch.testing.assert_close(module(x, t, w, 20.0, None), want * 2)
    with pytest.raises(ValueError, match=r"reduction_override must be one of None, .*got 'avg'"):
        module(x, t, w, reduction_override="avg")
    with pytest.raises(ValueError, match=r"momentum .*got 1.5"):
        type(module)(momentum=1.5)


def test_modules_can_be_called_positionally_as_mmdets() -> None:
    ghmc = GHMC(30, 0.75, True, 2.0, "sum")
    assert (ghmc.bins, ghmc.momentum, ghmc.use_sigmoid) == (30, 0.75, True)
    assert (ghmc.loss_weight, ghmc.reduction) == (2.0, "sum")
    ghmr = GHMR(0.1, 20, 0.7, 10.0, "none")
    assert (ghmr.mu, ghmr.bins, ghmr.momentum) == (0.1, 20, 0.7)
    assert (ghmr.loss_weight, ghmr.reduction) == (10.0, "none")
