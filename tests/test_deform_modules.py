"""The modules over deformable convolution: values, state, initialisation, life inside torch."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlops_triton import deform_conv2d
from dlops_triton.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from dlops_triton.reference import deform as reference
from tests.arrays import numpy
from tests.tolerances import assert_close

Pack = DeformConv2dPack | ModulatedDeformConv2dPack
PACKS = [DeformConv2dPack, ModulatedDeformConv2dPack]
packs = pytest.mark.parametrize("pack", PACKS)

# Every option at a value that matters, y other than x: 4 channels in 2 groups, 5 x 6 pixels.
GEOMETRY: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
OPTIONS: dict[str, Any] = {"kernel_size": (3, 2), **GEOMETRY, "groups": 2}


def image(device: torch.device, *size: int) -> Tensor:
    return torch.randn(2, 4, *(size or (5, 6)), device=device)


def trained(pack: type[Pack], device: torch.device, **options: Any) -> Pack:
    """A pack whose offsets are not zero, nor its bias."""
    module = pack(4, 6, **{**OPTIONS, **options}).to(device)
    for parameter in (*module.conv_offset.parameters(), module.bias):
        if parameter is not None:
            nn.init.normal_(parameter, std=0.3)
    return module


def taken_apart(module: Pack, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Offset and mask in mmcv's words."""
    both = module.conv_offset(x)
    if isinstance(module, DeformConv2dPack):
        return both, None
    first, second, mask = torch.chunk(both, 3, dim=1)
    return torch.cat((first, second), 1), torch.sigmoid(mask)


def by_reference(module: nn.Module, x: Tensor, offset: Tensor, mask: Tensor | None) -> Any:
    """The numpy reference, and the sizes of the terms that are added."""
    arrays = [None if t is None else numpy(t) for t in (x, offset, mask, module.weight)]
    bias = None if module.bias is None else numpy(module.bias)
    geometry = reference.Geometry((3, 2), **GEOMETRY)
    want = reference.conv2d(*arrays, bias, geometry)
    sizes = [None if a is None else abs(a) for a in arrays]
    sizes[1] = arrays[1]
    return want, reference.conv2d(*sizes, None if bias is None else abs(bias), geometry)


# ---- values


@pytest.mark.parametrize(("bias", "masked"), [(True, True), (False, False)])
def test_torchvisions(bias: bool, masked: bool, device: torch.device) -> None:
    module = DeformConv2d(4, 6, **OPTIONS, bias=bias).to(device)
    x = image(device)
    offset = torch.randn(2, 2 * 2 * 6, 3, 8, device=device)
    mask = torch.rand(2, 2 * 6, 3, 8, device=device) if masked else None
    got = module(x, offset, mask)
    assert got.shape == (2, 6, 3, 8)
    want = deform_conv2d(x, offset, module.weight, module.bias, (2, 1), (1, 2), (1, 2), mask)
    assert torch.equal(got, want)
    assert_close(got, *by_reference(module, x, offset, mask))
    if masked:
        assert torch.equal(module(input=x, offset=offset, mask=mask), got)
        assert not torch.equal(module(x, offset), got)


@packs
@pytest.mark.parametrize("groups", [1, 2])
def test_packs(pack: type[Pack], groups: int, device: torch.device) -> None:
    module = trained(pack, device, deform_groups=groups)
    x = image(device)
    offset, mask = taken_apart(module, x)
    assert offset.shape == (2, groups * 2 * 6, 3, 8)
    assert float(offset.detach().abs().max()) > 0.1
    got = module(x)
    want = deform_conv2d(x, offset, module.weight, module.bias, (2, 1), (1, 2), (1, 2), mask)
    assert torch.equal(got, want)
    assert_close(got, *by_reference(module, x, offset, mask))


@packs
def test_packs_start_as_plain_convolutions(pack: type[Pack], device: torch.device) -> None:
    module = pack(4, 6, **OPTIONS).to(device)
    x = image(device)
    plain = F.conv2d(x, module.weight, None, **GEOMETRY, groups=2)
    if pack is ModulatedDeformConv2dPack:
        assert module.bias is not None
        plain = plain / 2
        nn.init.normal_(module.bias)
        plain = plain + module.bias[:, None, None]
    torch.testing.assert_close(module(x), plain)


def test_the_second_packs_channels_are_mmcvs(device: torch.device) -> None:
    """Offset groups are outermost in the first two thirds of all channels; (y, x) for each tap."""
    module = ModulatedDeformConv2dPack(2, 2, 1, groups=2, deform_groups=2, bias=False).to(device)
    nn.init.ones_(module.weight)
    # Of group 0 (y, x), of group 1 (y, x), then a mask of each: almost 0 and 1.
    assert module.conv_offset.bias is not None
    shifts = torch.tensor([1.0, 0, 0, 2, 0, 40], device=device)
    module.conv_offset.bias.data.copy_(shifts)
    x = torch.randn(1, 2, 4, 5, device=device)
    want = torch.zeros_like(x)
    want[0, 0, :3] = x[0, 0, 1:] / 2
    want[0, 1, :, :3] = x[0, 1, :, 2:]
    torch.testing.assert_close(module(x), want)


@packs
def test_inputs_smaller_than_the_kernel(pack: type[Pack], device: torch.device) -> None:
    """mmcv pads them, and the offset, to the size of the kernel, and crops: the same numbers."""
    options = {"kernel_size": (5, 3), "stride": 1, "padding": (2, 1), "dilation": 1}
    module = trained(pack, device, **options)
    x = image(device, 3, 2)
    offset, mask = taken_apart(module, x)
    got = module(x)
    assert got.shape == (2, 6, 3, 2)
    padded = [None if t is None else F.pad(t, (0, 1, 0, 2)) for t in (x, offset, mask)]
    assert padded[0] is not None
    assert padded[0].shape[2:] == (5, 3)
    want = deform_conv2d(padded[0], padded[1], module.weight, module.bias, 1, (2, 1), 1, padded[2])
    assert want.shape == (2, 6, 5, 3)
    torch.testing.assert_close(got, want[:, :, :3, :2])


# ---- state


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def test_state_is_the_peers() -> None:
    weight, offset = {"weight": (6, 2, 3, 2)}, "conv_offset."
    assert shapes(DeformConv2d(4, 6, **OPTIONS)) == weight | {"bias": (6,)}
    assert shapes(DeformConv2d(4, 6, **OPTIONS, bias=False)) == weight
    v1 = shapes(DeformConv2dPack(4, 6, **OPTIONS, deform_groups=2))
    assert v1 == weight | {offset + "weight": (24, 4, 3, 2), offset + "bias": (24,)}
    v2 = shapes(ModulatedDeformConv2dPack(4, 6, **OPTIONS, deform_groups=2))
    of_offset = {offset + "weight": (36, 4, 3, 2), offset + "bias": (36,)}
    assert v2 == weight | {"bias": (6,)} | of_offset
    without = ModulatedDeformConv2dPack(4, 6, **OPTIONS, deform_groups=2, bias=False)
    assert shapes(without) == weight | of_offset
    assert without.bias is None


@pytest.mark.parametrize("module", [DeformConv2d, *PACKS])
def test_attributes_are_the_peers(module: type[DeformConv2d | Pack]) -> None:
    m = module(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2)  # by position
    assert (m.in_channels, m.out_channels, m.groups) == (4, 6, 2)
    sizes = (m.kernel_size, m.stride, m.padding, m.dilation)
    assert sizes == ((3, 2), (2, 1), (1, 2), (1, 2))
    m = module(4, 6, 3, 2, padding=1)
    assert (m.kernel_size, m.stride, m.padding, m.dilation) == ((3, 3), (2, 2), (1, 1), (1, 1))
    assert m.groups == 1
    if not isinstance(m, DeformConv2d):
        assert (m.deform_groups, m.transposed, m.output_padding) == (1, False, (0,))
        conv = module(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2, 2, False).conv_offset
        assert (conv.kernel_size, conv.stride) == ((3, 2), (2, 1))
        assert (conv.padding, conv.dilation, conv.groups) == ((1, 2), (1, 2), 1)


class Block(nn.Module):
    """Where packs are found in a ResNet."""

    def __init__(self, pack: type[Pack]):
        super().__init__()
        self.conv2 = pack(4, 6, **OPTIONS)


def load(module: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """As mmengine's loader, every module sees all keys; those missing."""
    state, missing = OrderedDict(state), []

    def visit(module: nn.Module, prefix: str) -> None:
        errors: list[str] = []
        module._load_from_state_dict(state, prefix, {}, True, missing, [], errors)
        assert not errors
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.")

    visit(module, "")
    return missing


@packs
def test_old_names_are_loaded(pack: type[Pack]) -> None:
    source = trained(pack, torch.device("cpu"))
    state = {f"conv2.{name}": t for name, t in source.state_dict().items()}
    old = {name.replace(".conv_offset", "_offset"): t for name, t in state.items()}
    assert {"conv2_offset.weight", "conv2_offset.bias", "conv2.weight"} <= set(old)
    for names in (old, state):
        target = Block(pack)
        assert load(target, names) == []
        for name, t in target.conv2.state_dict().items():
            assert torch.equal(t, source.state_dict()[name]), name
    # The new names win where both are there; a tensor alone is renamed alone.
    target = Block(pack)
    both = state | {"conv2_offset.weight": torch.zeros(1)}
    del both["conv2.conv_offset.bias"]
    both["conv2_offset.bias"] = old["conv2_offset.bias"] + 1
    assert load(target, both) == []
    assert torch.equal(target.conv2.conv_offset.weight, source.conv_offset.weight)
    assert torch.equal(target.conv2.conv_offset.bias, source.conv_offset.bias + 1)


@packs
def test_versions(pack: type[Pack]) -> None:
    source = trained(pack, torch.device("cpu"))
    state = source.state_dict()
    assert state._metadata[""]["version"] == 2
    old = OrderedDict((name.replace("conv_offset", "_offset"), t) for name, t in state.items())
    for version in (None, 1):
        old._metadata = OrderedDict({"": {} if version is None else {"version": version}})
        target = pack(4, 6, **OPTIONS)
        target.load_state_dict(old)  # strict
        assert torch.equal(target.conv_offset.weight, source.conv_offset.weight)
        assert "_offset.weight" in old  # the caller's own dict stays
    old._metadata = OrderedDict({"": {"version": 2}})
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_offset.weight"):
        pack(4, 6, **OPTIONS).load_state_dict(old)
    # Inside a model, torch's own way, with the names of today.
    model = Block(pack)
    model.load_state_dict({f"conv2.{name}": t for name, t in state.items()})
    assert torch.equal(model.conv2.conv_offset.bias, source.conv_offset.bias)


# ---- initialisation


def uniform_within(t: Tensor, bound: float) -> bool:
    """Of thousands, the largest comes near the bound, the variance near a third of its square."""
    largest, variance = float(t.detach().abs().max()), float(t.detach().var())
    return 0.99 * bound < largest <= bound and abs(variance / (bound**2 / 3) - 1) < 0.06


def test_initialisation() -> None:
    sizes: dict[str, Any] = {"kernel_size": (3, 2), "groups": 2}
    fan_in = 16 * 6
    module = DeformConv2d(32, 2000, **sizes)
    assert uniform_within(module.weight, 1 / math.sqrt(fan_in))
    largest = float(module.bias.detach().abs().max())
    assert 0.99 / math.sqrt(fan_in) < largest <= 1 / math.sqrt(fan_in)
    v1 = DeformConv2dPack(32, 64, **sizes)
    assert uniform_within(v1.weight, math.sqrt(6 / fan_in))
    v2 = ModulatedDeformConv2dPack(32, 64, **sizes)
    assert uniform_within(v2.weight, 1 / math.sqrt(2 * fan_in))
    assert not v2.bias.any()
    for pack in (v1, v2):
        before = pack.weight.detach().clone()
        for _ in range(2):
            assert not any(p.any() for p in pack.conv_offset.parameters())
            nn.init.ones_(pack.conv_offset.weight)
            nn.init.ones_(pack.conv_offset.bias)
            pack.reset_parameters()
        assert not torch.equal(pack.weight, before)


def test_one_seed_gives_torchvisions_numbers() -> None:
    torch.manual_seed(3)
    module = DeformConv2d(4, 6, **OPTIONS)
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 6, **OPTIONS)  # draws as torchvision does: the weight, then the bias
    assert torch.equal(module.weight, plain.weight)
    assert torch.equal(module.bias, plain.bias)


# ---- inside torch


@packs
def test_training_moves_the_offsets(pack: type[Pack], device: torch.device) -> None:
    module = pack(4, 6, **OPTIONS).to(device)
    x = image(device).requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = (module(x) ** 2).mean()
    before.backward()
    assert x.grad is not None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name
    by_bias = module.conv_offset.bias.grad
    parts = (by_bias[:12:2], by_bias[1:12:2], by_bias[12:])  # y, x, and of the second the mask
    assert [bool(part.any()) for part in parts] == [True, True, len(by_bias) == 18]
    optimizer.step()
    offset, _ = taken_apart(module, x)
    assert offset.any()
    assert (module(x) ** 2).mean() < before


@packs
def test_channels_last(pack: type[Pack], device: torch.device) -> None:
    module = trained(pack, device)
    x = image(device)
    want = module(x)
    assert want.is_contiguous()
    module = module.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    got = module(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.contiguous(), want)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient.any()


@pytest.mark.parametrize("module", [DeformConv2d, *PACKS])
def test_autocast(module: type[DeformConv2d | Pack], device: torch.device) -> None:
    """bf16 inside and out, parameters and their gradients fp32."""
    if module is DeformConv2d:
        m = DeformConv2d(4, 6, **OPTIONS).to(device)
        more = (torch.randn(2, 12, 3, 8, device=device),)
    else:
        m, more = trained(module, device), ()
    x = image(device)
    want = m(x, *more)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = m(x, *more)
    assert got.dtype == torch.bfloat16
    # Offsets of bf16 are wrong by 2**-9 of their size: a sample moves by a part of its slope.
    assert float((got.float() - want).detach().abs().max()) < 0.05
    got.float().sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.any(), name


@packs
@pytest.mark.filterwarnings("default")
def test_compiles_as_one_graph(pack: type[Pack], device: torch.device) -> None:
    torch._dynamo.reset()
    module, x = trained(pack, device), image(device).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    want, got = module(x), compiled(x)
    torch.testing.assert_close(got, want)
    leaves = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@packs
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies(
    pack: type[Pack], duplicate: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    module, x = trained(pack, device), image(device)
    other = duplicate(module)
    want = module(x)
    assert torch.equal(other(x), want)
    nn.init.zeros_(module.weight)
    assert torch.equal(other(x), want)


# ---- words


def test_repr() -> None:
    theirs = "DeformConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))"
    assert repr(DeformConv2d(4, 6, 3)) == theirs
    assert repr(DeformConv2d(4, 6, **OPTIONS, bias=False)) == (
        "DeformConv2d(4, 6, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), "
        "groups=2, bias=False)"
    )
    text = repr(ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2))
    assert "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), deform_groups=2\n" in text
    assert "(conv_offset): Conv2d(4, 54, " in text
    assert ", bias=False\n" in repr(DeformConv2dPack(4, 6, 3))


@pytest.mark.parametrize("module", [DeformConv2d, *PACKS])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": 3}, ValueError, "in_channels must be a multiple of groups, 3, got 4"),
        ({"groups": 4}, ValueError, "out_channels must be a multiple of groups, 4, got 6"),
        ({"groups": 0}, ValueError, "groups must be an integer of at least 1, .*got 0"),
        ({"in_channels": 4.0}, TypeError, "in_channels must be an integer .*got 4.0"),
        ({"out_channels": -1}, ValueError, "out_channels must be an integer .*got -1"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be an integer, or two, .*got 0"),
        ({"stride": (1, 0)}, ValueError, "stride must be an integer, or two, .*got 0"),
        ({"padding": "same"}, TypeError, "padding must be an integer, or two, .*got 'same'"),
        ({"dilation": (1, 1, 1)}, ValueError, r"dilation must be .*two, .*got \(1, 1, 1\)"),
    ],
)
def test_rejected(
    module: type[DeformConv2d | Pack],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    options: dict[str, Any] = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    with pytest.raises(error, match=message):
        module(**(options | change))


def test_packs_reject(device: torch.device) -> None:
    with pytest.raises(ValueError, match="bias must be False, got True"):
        DeformConv2dPack(4, 6, 3, bias=True)
    for pack in PACKS:
        with pytest.raises(ValueError, match="in_channels must be a multiple of deform_groups, 3"):
            pack(4, 6, 3, deform_groups=3)
        with pytest.raises(ValueError, match=r"deform_groups must be an integer .*got 0"):
            pack(4, 6, 3, deform_groups=0)
    offset = torch.zeros(2, 12, 3, 8, device=device)
    with pytest.raises(ValueError, match=r"offset must have shape .*got \(2, 12, 3, 7\)"):
        DeformConv2d(4, 6, **OPTIONS).to(device)(image(device), offset[..., :7])
