"""Real torchvision and mmdet, with and without ``patch``; each skipped where it is not installed.

``make peers`` installs them. torchvision's own tests run where TORCHVISION_TESTS is the ``test``
folder of a checkout of torchvision.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dlops_triton
from dlops_triton import _dispatch
from tests.test_compat_torchvision import boxes

ROOT = Path(__file__).parents[1]
CLASSES = (
    "TestNMS",
    "TestDeformConv",
    "TestBoxIou",
    "TestGeneralizedBoxIou",
    "TestDistanceBoxIoU",
    "TestCompleteBoxIou",
    "TestGeneralizedBoxIouLoss",
    "TestDistanceBoxIouLoss",
    "TestCompleteBoxIouLoss",
    "TestFocalLoss",
)


def installed(name: str) -> Any:
    """The library, or a skip that says why not."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision built for another torch raises RuntimeError
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {error}")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, or the CPU with the reference: a detector's boxes are too many to interpret."""
    monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def no_filled_memory(known_memory: None) -> None:
    """Other people's models, as they run."""
    torch.use_deterministic_algorithms(False)


# ---- torchvision


def test_signatures_of_torchvision() -> None:
    ops = installed("torchvision").ops
    for name in dlops_triton.compat.torchvision.__all__:
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(m, name)).parameters.values()]
            for m in (dlops_triton.compat.torchvision, ops)
        )
        assert ours[: len(theirs)] == theirs, name


def detector(name: str) -> Any:
    models = installed("torchvision").models.detection
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "weights": None,
        "weights_backbone": None,
        "num_classes": 5,
        "min_size": 128,
        "max_size": 160,
    }
    # Below 1,000 boxes, from which on torchvision's order of equal scores on a CPU is not stable.
    if name == "fasterrcnn_resnet50_fpn":
        options |= {"rpn_pre_nms_top_n_train": 300, "rpn_pre_nms_top_n_test": 300}
        return getattr(models, name)(**options, box_score_thresh=0.02)
    return getattr(models, name)(**options, score_thresh=0.005, topk_candidates=200)


CALLED = {
    "retinanet_resnet50_fpn": {"dlops::nms", "dlops::box_iou_fwd", "dlops::focal_fwd"},
    "fcos_resnet50_fpn": {"dlops::nms", "dlops::iou_loss_fwd", "dlops::focal_fwd"},
    "fasterrcnn_resnet50_fpn": {"dlops::nms", "dlops::box_iou_fwd"},
}


@pytest.mark.unmetered
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CALLED)
def test_detectors_of_torchvision(name: str, place: torch.device) -> None:
    """Boxes, labels and scores are equal, losses and gradients close."""
    model = detector(name).to(place)
    images = [torch.rand(3, 128, 128, device=place), torch.rand(3, 96, 140, device=place)]
    targets = [
        {
            "boxes": boxes(n, place, 40) + torch.tensor([0.0, 0, 5, 5], device=place),
            "labels": torch.arange(n, device=place) % 4 + 1,
        }
        for n in (5, 2)
    ]

    state = copy.deepcopy(model.state_dict())

    def run() -> tuple[list[dict[str, Tensor]], dict[str, Tensor], list[Tensor]]:
        model.load_state_dict(state)  # training changes the statistics of batch normalization
        torch.manual_seed(1)  # the sampler of Faster R-CNN draws
        losses = model.train()(images, targets)
        weights = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(losses.values()), weights, allow_unused=True)
        with torch.no_grad():
            return model.eval()(images), losses, [g for g in gradients if g is not None]

    found, losses, gradients = run()
    with dlops_triton.patch("torchvision") as done:
        assert len(done.replaced) == 11
        with torch.profiler.profile() as profiler:
            got, got_losses, got_gradients = run()
    called = {event.name for event in profiler.events()}
    assert CALLED[name] <= called
    assert sum(len(image["boxes"]) for image in found) > 20
    for ours, theirs in zip(got, found, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
    assert got_losses.keys() == losses.keys()
    for key, value in got_losses.items():
        torch.testing.assert_close(value, losses[key], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


def test_torchvisions_own_tests(tmp_path: Path) -> None:
    """All of test_ops.py that concerns these ops, in a process of its own, through ``patch``."""
    installed("torchvision")
    folder = os.environ.get("TORCHVISION_TESTS")
    if not folder:
        pytest.skip("TORCHVISION_TESTS is not set to the folder of torchvision's tests")
    (tmp_path / "patched.py").write_text('import dlops_triton\ndlops_triton.patch("torchvision")\n')
    path = os.pathsep.join((str(ROOT), str(tmp_path), folder))
    # On the CPU the reference: the interpreter takes too long for gradcheck.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "patched", "-W", "ignore", "-x"]
    command += ["-p", "no:cacheprovider", "test_ops.py", "-k", " or ".join(CLASSES)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 200


# ---- mmdet, on mmcv or on mmcv-lite


@pytest.fixture
def mm() -> Iterator[Any]:
    """mmdet's modules; mmcv's ops are patched, without which mmcv-lite has none."""
    installed("mmcv")
    installed("mmdet")
    with dlops_triton.install_mmcv_ops():
        yield importlib.import_module("mmdet.models")


def compared(run: Callable[[], dict[str, Any]]) -> None:
    """``run`` gives with ``patch("mmdet")`` what it gives without, integers exactly."""
    torch.manual_seed(1)
    want = run()
    with dlops_triton.patch("mmdet") as done:
        assert len(done.replaced) == 7
        torch.manual_seed(1)
        got = run()
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=2e-5, atol=1e-6, msg=name)


def with_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.unmetered
@pytest.mark.filterwarnings("default")
def test_losses_of_mmdet(mm: Any, place: torch.device) -> None:
    losses = importlib.import_module("mmdet.models.losses")

    def run() -> dict[str, Any]:
        found: dict[str, Any] = {}
        x, t = torch.randn(50, 8, device=place), torch.randint(0, 9, (50,), device=place)
        dense = torch.nn.functional.one_hot(t, 9)[:, :8]
        w = torch.rand(50, device=place)
        used = (w > 0.3).float()
        for reduction in ("mean", "sum", "none"):
            focal = losses.FocalLoss(reduction=reduction)
            found[f"focal {reduction}"] = with_gradient(lambda x, f=focal: f(x, t, w), x)
            flat = torch.rand(400, device=place)
            found[f"dense {reduction}"] = with_gradient(
                lambda x, f=focal, w=flat: f(x, dense, w), x
            )
        focal = losses.FocalLoss(loss_weight=2.0)
        found["factor"] = with_gradient(lambda x: focal(x, t, w[:, None], avg_factor=7), x)
        activated = losses.FocalLoss(activated=True)
        found["activated"] = with_gradient(lambda x: activated(x.sigmoid(), t, w), x)
        ghmc = losses.GHMC(bins=30, momentum=0.75).to(place)
        for i in range(3):
            found[f"ghmc {i}"] = with_gradient(lambda x: ghmc(x, t, used), x * (i + 1))
        found["counts"] = ghmc.acc_sum.clone()
        expanded = used[:, None].expand(50, 8)
        of_dense = losses.GHMC().to(place)
        found["ghmc dense"] = with_gradient(lambda x: of_dense(x, dense, expanded), x)
        ghmr = losses.GHMR().to(place)
        found["ghmr"] = with_gradient(
            lambda x: ghmr(x[:, :4], x.detach()[:, 4:], expanded[:, :4], avg_factor=9.0), x
        )
        a, b = boxes(50, place), boxes(50, place)
        four, seven = w[:, None].expand(50, 4), torch.tensor(7.0, device=place)
        for name in ("GIoULoss", "DIoULoss"):
            for reduction in ("mean", "sum", "none"):
                loss = getattr(losses, name)(reduction=reduction)
                found[f"{name} {reduction}"] = with_gradient(lambda a, f=loss: f(a, b, w), a)
            loss = getattr(losses, name)(loss_weight=2.0)
            found[f"{name} factor"] = with_gradient(
                lambda a, f=loss: f(a, b, four, avg_factor=seven), a
            )
        overlaps = importlib.import_module("mmdet.structures.bbox").bbox_overlaps
        for mode in ("iou", "iof", "giou"):
            for aligned in (False, True):
                found[f"{mode} {aligned}"] = with_gradient(
                    lambda a, m=mode, al=aligned: overlaps(a, b, m, al), a
                )
        return found

    compared(run)


@pytest.mark.unmetered
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_pos_iou": 0.3},
        {"match_low_quality": False},
        {"neg_iou_thr": (0.1, 0.4)},
        {"ignore_iof_thr": 0.5},
        {"ignore_iof_thr": 0.5, "ignore_wrt_candidates": False},
        {"gt_max_assign_all": False},
        {"gpu_assign_thr": 3},
    ],
    ids=str,
)
def test_assigner_of_mmdet(mm: Any, place: torch.device, options: dict[str, Any]) -> None:
    assigners = importlib.import_module("mmdet.models.task_modules.assigners")
    instances = importlib.import_module("mmengine.structures").InstanceData

    def run() -> dict[str, Any]:
        found = {}
        settings = {"pos_iou_thr": 0.5, "neg_iou_thr": 0.4} | options
        assigner = assigners.MaxIoUAssigner(**settings)
        for n in (7, 0):
            labels = torch.arange(n, device=place)
            result = assigner.assign(
                instances(priors=boxes(500, place)),
                instances(bboxes=boxes(n, place), labels=labels),
                instances(bboxes=boxes(3, place)),
            )
            assert type(result) is assigners.AssignResult
            found |= {f"indices {n}": result.gt_inds, f"labels {n}": result.labels}
            found[f"overlaps {n}"] = result.max_overlaps
        return found

    compared(run)


@pytest.mark.unmetered
@pytest.mark.filterwarnings("default")
def test_detector_head_of_mmdet(mm: Any, place: torch.device) -> None:
    """A RetinaNet's head: what it is trained on, its losses, and what it finds."""
    structures = importlib.import_module("mmengine.structures")
    samples = importlib.import_module("mmdet.structures").DetDataSample
    config = importlib.import_module("mmengine.config").ConfigDict
    torch.manual_seed(0)
    head = mm.RetinaHead(
        num_classes=4,
        in_channels=8,
        stacked_convs=1,
        feat_channels=8,
        loss_bbox={"type": "GIoULoss", "loss_weight": 2.0},
        reg_decoded_bbox=True,
        train_cfg=config(
            assigner={
                "type": "MaxIoUAssigner",
                "pos_iou_thr": 0.5,
                "neg_iou_thr": 0.4,
                "min_pos_iou": 0,
                "ignore_iof_thr": -1,
            },
            sampler={"type": "PseudoSampler"},
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=config(
            nms_pre=300,
            min_bbox_size=0,
            score_thr=0.005,
            nms={"type": "nms", "iou_threshold": 0.5},
            max_per_img=50,
        ),
    ).to(place)
    head.init_weights()
    sizes = [2**k for k in (4, 3, 2, 1, 1)]
    features = [torch.randn(2, 8, size, size, device=place) for size in sizes]
    data = []
    for n in (5, 0):
        sample = samples()
        labels = torch.arange(n, device=place) % 4
        sample.gt_instances = structures.InstanceData(bboxes=boxes(n, place), labels=labels)
        sample.set_metainfo(
            {
                "img_shape": (128, 128),
                "pad_shape": (128, 128),
                "ori_shape": (128, 128),
                "scale_factor": (1.0, 1.0),
                "batch_input_shape": (128, 128),
            }
        )
        data.append(sample)

    def run() -> dict[str, Any]:
        losses = {
            k: torch.stack([v.detach() for v in vs]) for k, vs in head.loss(features, data).items()
        }
        with torch.no_grad():
            for i, image in enumerate(head.predict(features, data)):
                assert len(image.bboxes) > 5
                losses |= {f"boxes {i}": image.bboxes, f"labels {i}": image.labels}
                losses[f"scores {i}"] = image.scores
        return losses

    compared(run)
