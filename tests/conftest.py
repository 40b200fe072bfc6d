"""One suite, two machines: compiled on a GPU, interpreted on the CPU without one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

# Must precede the first import of triton: @triton.jit reads it when it decorates.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which host_cost uses, is chatty

from dlops_triton import _dispatch
from tests.tools import interpreter, traffic
from tests.tools.fixtures import gate as gate

torch.set_num_threads(1)
if _dispatch.INTERPRETED:
    interpreter.install_fixes()

# What --hypothesis-profile=thorough is for, where a test leaves the number open.
hypothesis.settings.register_profile("default", max_examples=200)
hypothesis.settings.register_profile("thorough", max_examples=5000)
hypothesis.settings.load_profile("default")

KERNEL_DEVICE = torch.device("cpu" if _dispatch.INTERPRETED else "cuda")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device on which a call runs the Triton kernels, compiled or interpreted."""
    monkeypatch.setattr(_dispatch, "cpu_implementation", "kernel")
    return KERNEL_DEVICE


@pytest.fixture(params=["kernel", "reference"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of either implementation in turn: what users meet, on a GPU and without one."""
    monkeypatch.setattr(_dispatch, "cpu_implementation", request.param)
    return KERNEL_DEVICE if request.param == "kernel" else torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """What a user has: the GPU, or without one the reference; for what is above either."""
    if KERNEL_DEVICE.type == "cpu":
        monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")
    return KERNEL_DEVICE


@pytest.fixture(autouse=True)
def known_memory() -> Iterator[None]:
    """One seed; and torch.empty gives NaN or the largest integer: what no kernel wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def within_bounds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every interpreted launch of every test runs under the meter's check of its addresses."""
    if not _dispatch.INTERPRETED or "unmetered" in request.keywords:
        yield
        return
    with traffic.traffic() as meter:
        yield
    assert meter.out_of_bounds == 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unmetered: the test installs a meter of its own")
