"""torch.compile, torch.export, fake tensors and autocast take every op, one by one."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dlops_triton import nn as modules
from tests.calls import CALLS, FIXED, FUNCTIONS, MODULES, OPS, Call, made

pytestmark = pytest.mark.filterwarnings("default")


def test_every_op_and_module_is_called() -> None:
    assert {name.split(",")[0] for name in FUNCTIONS} == OPS
    classes = {
        name
        for name, value in vars(modules).items()
        if inspect.isclass(value) and value.__module__ == modules.__name__ and name[0] != "_"
    }
    assert classes == set(MODULES)


def assert_same(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", CALLS)
def test_compile(name: str, quick: torch.device) -> None:
    """The whole graph, forward and backward, once for all sizes.

    What has a fixed size as torch is set by default. By inductor, where there is a GPU, is in
    test_library.
    """
    call = CALLS[name]
    torch._dynamo.reset()
    eager, called = made(call, quick), made(call, quick)
    compiled = torch.compile(called, fullgraph=True, dynamic=True, backend="aot_eager")
    symbols = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=bool(call.data_sized))
    for n, stance in ((7, "default"), (11, "fail_on_recompile")):
        with torch.compiler.set_stance(stance), symbols:
            got = call.differentiated(compiled, call.leaves(quick, n))
        want = call.differentiated(eager, call.leaves(quick, n))
        assert_same((*got[0], *got[1]), (*want[0], *want[1]))
    if isinstance(called, nn.Module):
        assert_same(tuple(called.buffers()), tuple(eager.buffers()))


class Model(nn.Module):
    """What is called, as a module, which export wants."""

    def __init__(self, call: Call, device: torch.device):
        super().__init__()
        self.called = made(call, device)

    def forward(self, *tensors: Tensor) -> Any:
        return self.called(*tensors)


@pytest.mark.parametrize("name", CALLS)
def test_export(name: str, device: torch.device) -> None:
    """With any number of rows, boxes or images."""
    call = CALLS[name]
    model = Model(call, device).eval()
    n = torch.export.Dim("n", min=3, max=1000)
    tensors = call.leaves(device, 7)
    dims = {"sets": ({0: n}, {0: n + 2})}.get(call.tensors.__name__)
    if dims is None:
        growing = zip(tensors, call.growing, strict=False)
        dims = tuple({} if dim < 0 else {dim: n} for _, dim in growing)
    program = torch.export.export(model, tensors, dynamic_shapes=(dims,), strict=False)
    symbols = [str(symbol) for symbol in program.range_constraints]
    assert symbols
    assert any(s.startswith("u") for s in symbols) == bool(call.data_sized)
    other = call.leaves(device, 11)
    want = call.results(model, other)
    assert_same(call.results(program.module(), other), want)


@pytest.mark.parametrize("name", FIXED)
def test_meta_and_fake_tensors(name: str, quick: torch.device) -> None:
    """Shapes, dtypes and strides without data, forward and backward."""
    call = FIXED[name]
    want = call.differentiated(made(call, quick), call.leaves(quick, 7))
    meta = call.differentiated(made(call, "meta"), call.leaves("meta", 7))
    with FakeTensorMode():
        fake = call.differentiated(made(call, quick), call.leaves(quick, 7))
    for found, kind in ((meta, torch.device("meta")), (fake, quick)):
        for x, y in zip((*found[0], *found[1]), (*want[0], *want[1]), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
            assert x.device.type == kind.type


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str, quick: torch.device) -> None:
    """What is in fp32 stays there, forward and backward; of the deformable ones what is in fp64,
    for they do as convolutions do, which test_deform_inputs has."""
    call = CALLS[name]
    called, leaves = made(call, quick), call.leaves(quick, 7)
    if "deform" in name.lower():
        called = called.double() if isinstance(called, nn.Module) else called
        leaves = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in leaves)
    state = copy.deepcopy(called)
    want = call.differentiated(called, leaves)
    with torch.autocast(quick.type, dtype=torch.bfloat16):
        got = call.differentiated(state, leaves)
    for x, y in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
