"""CUDA graphs, streams and a second GPU for every op; a model of them packed by AOTInductor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlops_triton as d
from dlops_triton import _dispatch
from dlops_triton.nn import DeformConv2dPack
from tests.calls import CALLS, FIXED, OPS, Call, Made, boxes, made

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def assert_same(got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def joined(call: Call, called: Any, leaves: Made) -> Made:
    """Results and gradients."""
    results, gradients = call.differentiated(called, leaves)
    return (*(t.detach() for t in results), *gradients)


def fill(leaves: Made, others: Made) -> None:
    with torch.no_grad():
        for held, new in zip(leaves, others, strict=True):
            held.copy_(new)


@on_gpu
@pytest.mark.parametrize("name", FIXED)
def test_cuda_graph(name: str) -> None:
    """Captured, forward and backward, and replayed on other data."""
    call = FIXED[name]
    called, eager = made(call, "cuda"), made(call, "cuda")
    state = dict(called.named_buffers()) if isinstance(called, nn.Module) else {}
    at_first = {key: value.clone() for key, value in state.items()}
    leaves = call.leaves("cuda", 7)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and warms up what torch keeps for autograd
        for _ in range(2):
            joined(call, called, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = joined(call, called, leaves)
    for key, value in state.items():
        value.copy_(at_first[key])
    for seed in (1, 2):
        others = call.leaves("cuda", 7, seed)
        fill(leaves, others)
        graph.replay()
        assert_same(got, joined(call, eager, others))
    if isinstance(eager, nn.Module):
        assert_same(tuple(state.values()), tuple(eager.buffers()))


@on_gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_stream_of_ones_own(name: str) -> None:
    """The launches are in the stream: they wait for what it does first, as the inputs do here."""
    call = CALLS[name]
    want = joined(call, made(call, "cuda"), call.leaves("cuda", 7))
    others, called = call.leaves("cuda", 7), made(call, "cuda")
    leaves = tuple(torch.zeros_like(t).requires_grad_(t.requires_grad) for t in others)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # some 10 ms, in which nothing that ran ahead sees the data
        fill(leaves, others)
        got = joined(call, called, leaves)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, want)


@on_two
@pytest.mark.parametrize("name", CALLS)
def test_the_second_device(name: str) -> None:
    """Whichever is current."""
    call = CALLS[name]
    torch.manual_seed(0)
    first = call.leaves("cuda:0", 7)
    second = tuple(t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in first)
    there = made(call, "cuda:0")
    want = joined(call, there, first)
    beside = made(call, "cuda:0")
    got = joined(call, beside.to("cuda:1") if isinstance(beside, nn.Module) else beside, second)
    assert torch.cuda.current_device() == 0
    for x, y in zip(got, want, strict=True):
        assert x.device == torch.device("cuda:1")
        torch.testing.assert_close(x.to("cuda:0"), y)


class Detector(nn.Module):
    """A model that calls every op."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = DeformConv2dPack(4, 5, 3, padding=1)
        nn.init.normal_(self.layer.conv_offset.weight, std=0.3)
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, image: Tensor, b: Tensor, scores: Tensor, labels: Tensor) -> Any:
        offset = self.layer.conv_offset(image)
        x = self.layer(image).mean((2, 3)).repeat(4, 1)[: labels.shape[0]]
        return (
            x,
            d.deform_conv2d(image, offset, self.weight, padding=1),
            d.deform_sample(image, offset, 3, padding=1),
            d.sigmoid_focal_loss(x, labels, reduction="mean"),
            d.softmax_focal_loss(x, labels),
            d.ghmc_loss(x, labels),
            d.ghmr_loss(x, x * 2),
            d.box_iou(b[0], b[1]),
            d.generalized_box_iou(b[0], b[1]),
            d.distance_box_iou(b[0], b[1]),
            d.complete_box_iou(b[0], b[1]),
            d.generalized_box_iou_loss(b[0], b[1]),
            d.distance_box_iou_loss(b[0], b[1], "sum"),
            d.complete_box_iou_loss(b[0], b[1], "mean"),
            *d.box_match(b[0], b[1]),
            *d.nms_padded(b, scores, 0.5, max_output=4),
            *d.soft_nms_padded(b, scores, max_output=4),
            d.nms(b[0], scores[0], 0.5),
            d.batched_nms(b[0], scores[0], labels, 0.5),
            *d.soft_nms(b[0], scores[0]),
        )


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available() or not shutil.which("nvcc"),
                reason="needs a GPU, and the CUDA toolkit",
            ),
        ),
    ],
)
def test_ahead_of_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by AOTInductor, packed, loaded, run: by its proxy, which calls ops of Python."""
    assert set(Detector.forward.__code__.co_names) >= OPS
    monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")
    device = torch.device(kind)
    model = Detector().to(device).eval().requires_grad_(False)
    arguments = (
        torch.randn(2, 4, 5, 5, device=device),
        boxes(2, 8, device=device),
        torch.rand(2, 8, device=device),
        torch.randint(0, 6, (8,), device=device),
    )
    program = torch.export.export(model, arguments, strict=False)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for _ in range(2):
        assert_same(tuple(loaded(*arguments)), model(*arguments))
        arguments = (arguments[0] + 1, arguments[1].flip(0), *arguments[2:])
