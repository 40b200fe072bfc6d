"""``patch`` on libraries made up here, with the names and signatures of the real ones."""

from __future__ import annotations

import functools
import pickle
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dlops_triton
from dlops_triton import _patch, compat
from tests.test_compat_torchvision import plain

LIBRARIES = ("torchvision", "mmcv", "mmdet", "detectron2")
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
SCORES = torch.tensor([0.5, 0.9, 0.1])


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """The module of that name, made with those above it, as attributes of one another."""
    if name not in sys.modules or not hasattr(sys.modules[name], "made_up"):
        made = types.ModuleType(name)
        made.made_up = True  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, made)
    parent, _, child = name.rpartition(".")
    if parent:
        above = module(monkeypatch, parent)
        # As in mmdet, a function may hide the module of its name.
        if not callable(vars(above).get(child)):
            setattr(above, child, sys.modules[name])
    return sys.modules[name]


def made_up(monkeypatch: pytest.MonkeyPatch, library: str, version: str) -> Any:
    """A library whose ops return their names, and are also in its topmost module."""
    top = module(monkeypatch, library)
    top.__version__ = version
    for op in _patch._PEERS[library].ops.values():
        owner = module(monkeypatch, op.module)
        class_name, _, name = op.name.rpartition(".")
        arguments = plain(op.replacement).replace("**_", "**kwargs")
        program = f"def {name}({arguments}): return 'original {op.name}'"
        space: dict[str, Any] = {"__name__": op.module}
        if class_name:
            program = f"class {class_name}:\n  {program}\n  def assign_wrt_overlaps(self): ..."
        exec(program, space)
        made = space[class_name or name]
        setattr(owner, class_name or name, made)
        setattr(top, class_name or name, made)
    return top


@pytest.fixture
def tv(monkeypatch: pytest.MonkeyPatch) -> Any:
    return made_up(monkeypatch, "torchvision", "0.29.1+cu130")


def user_of(tv: Any, monkeypatch: pytest.MonkeyPatch, name: str = "a_project") -> Any:
    """A module with ``from torchvision import nms as suppress``, and a function that uses it."""
    user = module(monkeypatch, name)
    user.suppress = tv.nms
    user.mine = compat.torchvision.nms
    exec("def use(boxes, scores): return suppress(boxes, scores, 0.5)", vars(user))
    return user


def test_everywhere_and_back(tv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    user = user_of(tv, monkeypatch)
    original, partial = tv.nms, functools.partial(tv.nms)
    with dlops_triton.patch("torchvision") as done:
        assert set(done.replaced) == set(compat.torchvision.__all__) - {"DeformConv2d"}
        assert done.replaced["nms"] == [
            "a_project.suppress",
            "torchvision.nms",
            "torchvision.ops.boxes.nms",
        ]
        assert user.use(BOXES, SCORES).tolist() == [1, 2]
        assert tv.nms(BOXES, SCORES, 0.5).tolist() == [1, 2]
        assert tv.nms.__doc__ == compat.torchvision.nms.__doc__
        assert partial(1, 2, 3) == "original nms"  # kept by reference elsewhere
        late = user_of(tv, monkeypatch, "imported_later")
        assert late.suppress is tv.nms
    assert user.suppress is late.suppress is tv.nms is sys.modules["torchvision.ops.boxes"].nms
    assert tv.nms is original
    assert user.mine is late.mine is compat.torchvision.nms
    done.undo()
    assert tv.nms is original


def test_twice_and_in_parts(tv: Any) -> None:
    original = tv.nms, tv.box_iou
    first = dlops_triton.patch("torchvision", ["nms"])
    ours = tv.nms
    second = dlops_triton.patch("torchvision", ["nms", "box_iou", "nms"])
    assert second.already == ["nms"]
    assert list(second.replaced) == ["box_iou"]
    assert tv.nms is ours
    first.undo()
    assert tv.nms is original[0]
    assert tv.box_iou is not original[1]
    second.undo()
    assert (tv.nms, tv.box_iou) == original


def test_report(tv: Any) -> None:
    tv.again, tv.more = tv.nms, tv.nms
    with dlops_triton.patch("torchvision", ["nms"]), dlops_triton.patch("torchvision") as done:
        lines = str(done).splitlines()
        assert lines[0] == "torchvision 0.29.1+cu130: 10 ops replaced in 20 places"
        assert (
            "  deform_conv2d             torchvision.deform_conv2d, torchvision.ops." in lines[10]
        )
        assert lines[-1].split(maxsplit=1) == ["nms", "by an earlier patch"]
    done = dlops_triton.patch("torchvision", ["nms"])
    places = "torchvision.again, torchvision.more, torchvision.nms and 1 more"
    assert str(done).splitlines()[1] == f"  nms  {places}"
    done.undo()


def test_modules_that_mind(tv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lazy ones, ones that refuse to be changed, and what is no module at all."""

    class Odd(types.ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError(name)

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("imported for nothing")

    odd = Odd("odd")
    vars(odd)["nms"] = original = tv.nms
    monkeypatch.setitem(sys.modules, "odd", odd)
    monkeypatch.setitem(sys.modules, "odder", object())  # type: ignore[arg-type]
    own = types.ModuleType("dlops_triton.made_up")  # what is compared with theirs
    vars(own)["nms"] = tv.nms
    monkeypatch.setitem(sys.modules, own.__name__, own)
    with dlops_triton.patch("torchvision") as done:
        assert "odd.nms" in done.replaced["nms"]
        assert odd.nms is tv.nms is not original
        assert own.nms is original
    assert odd.nms is original


def test_a_block_that_fails_is_undone(tv: Any) -> None:
    original = tv.nms

    def fail() -> None:
        with dlops_triton.patch("torchvision"):
            assert tv.nms is not original
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tv.nms is original


def test_pickles_hold_the_librarys_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a model that holds a function can be saved, and loaded where nothing is patched."""
    for library, name in (("torchvision", "nms"), ("mmcv", "batched_nms"), ("mmcv", "nms")):
        top = made_up(monkeypatch, library, "2.1" if library == "mmcv" else "0.29")
        original = getattr(top, name)
        with dlops_triton.patch(library):
            kept = pickle.dumps(getattr(top, name))
            assert pickle.loads(kept) is getattr(top, name)
        assert pickle.loads(kept) is original


def test_what_is_refused(tv: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="library must be one of 'torchvision', 'mmcv', 'mmdet'"):
        dlops_triton.patch("kornia")
    for ops in (["nms", "roi_align"], "nms"):
        with pytest.raises(ValueError, match="ops must be a list of 'nms', 'batched_nms'"):
            dlops_triton.patch("torchvision", ops)
    for version, what in (("0.30.0", "new"), ("1.0", "new"), ("0.14.9", "old"), ("", "old")):
        tv.__version__ = version
        with pytest.raises(RuntimeError, match=f"is too {what} to be known: .* 0.15 to 0.29"):
            dlops_triton.patch("torchvision")
    tv.__version__ = "0.29.0"
    del sys.modules["torchvision.ops.boxes"].nms  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"torchvision has no torchvision\.ops\.boxes\.nms"):
        dlops_triton.patch("torchvision")
    (tmp_path / "mmcv.py").write_text("assert False, 'MMCV is used but incompatible'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mmcv", raising=False)
    with pytest.raises(ModuleNotFoundError, match="mmcv cannot be imported: MMCV is used but inc"):
        dlops_triton.patch("mmcv")
    monkeypatch.setitem(sys.modules, "mmdet", None)  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match="mmdet is not installed"):
        dlops_triton.patch("mmdet")


def test_other_arguments_are_refused_and_nothing_is_replaced(tv: Any) -> None:
    boxes = sys.modules["torchvision.ops.boxes"]
    original = boxes.nms

    def batched_nms(boxes: Any, scores: Any, classes: Any, iou_threshold: float) -> None: ...

    boxes.batched_nms = batched_nms
    with pytest.raises(
        RuntimeError, match=r"batched_nms of torchvision 0.29.1\+cu130 has arguments"
    ):
        dlops_triton.patch("torchvision")
    assert boxes.nms is original
    # Fewer arguments, as an older release has them, are known.
    boxes.batched_nms = lambda boxes, scores, idxs: None
    dlops_triton.patch("torchvision", ["batched_nms"]).undo()


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _patch._PEERS[library]
    top = made_up(monkeypatch, library, ".".join(map(str, peer.newest)) + ".0")
    before = dict(vars(top))
    with dlops_triton.patch(library) as done:
        assert set(done.replaced) == set(peer.ops)
        for name, op in peer.ops.items():
            owner, _, attribute = op.name.rpartition(".")
            if not owner:
                found = getattr(top, attribute)
                assert f"{library}.{attribute}" in done.replaced[name]
            else:
                found = getattr(getattr(top, owner), attribute)
                assert done.replaced[name] == [f"{op.module}.{op.name}"]
            assert found is not before.get(attribute)
            assert plain(found) == plain(op.replacement)
    assert vars(top) == before


def test_functions_of_autograd_and_scripted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mmcv, detectron2 and fvcore define theirs."""
    made_up(monkeypatch, "detectron2", "0.6")

    class Deform(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, input: Any, offset: Any, weight: Any, stride: int = 1, padding: int = 0
        ) -> Any: ...

    where = sys.modules["detectron2.layers.deform_conv"]
    where.deform_conv = Deform.apply  # type: ignore[attr-defined]
    scripted = torch.jit.CompilationUnit("def f(inputs, targets):\n  return inputs\n").f
    sys.modules["fvcore.nn.focal_loss"].sigmoid_focal_loss_jit = scripted  # type: ignore[attr-defined]
    with dlops_triton.patch("detectron2", ["deform_conv", "sigmoid_focal_loss_jit"]) as done:
        assert len(done.replaced) == 2
    scripted = torch.jit.CompilationUnit("def f(logits, targets):\n  return logits\n").f
    sys.modules["fvcore.nn.focal_loss"].sigmoid_focal_loss_jit = scripted  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"arguments that are not known: \(logits, targets\)"):
        dlops_triton.patch("detectron2", ["sigmoid_focal_loss_jit"])


def test_methods_reach_existing_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    top = made_up(monkeypatch, "mmdet", "3.3.0")
    loss = top.FocalLoss()
    loss.use_sigmoid, loss.activated = True, False
    loss.gamma, loss.alpha, loss.reduction, loss.loss_weight = 2.0, 0.25, "sum", 1.0
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    with dlops_triton.patch("mmdet"):
        want = dlops_triton.sigmoid_focal_loss(x, y, reduction="sum")
        assert torch.equal(loss.forward(x, y), want)
        learnt = torch.ones(4, requires_grad=True)
        assert loss.forward(x, y, weight=learnt) == "original FocalLoss.forward"
        loss.activated = True
        assert loss.forward(x, y) == "original FocalLoss.forward"
    loss.activated = False
    assert loss.forward(x, y) == "original FocalLoss.forward"
    with dlops_triton.patch("mmdet"):
        top.FocalLoss.forward = lambda *_: "someone else's"
    assert loss.forward(x, y) == "someone else's"


def test_what_is_not_covered_goes_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    cv = made_up(monkeypatch, "mmcv", "2.1.0")
    det = made_up(monkeypatch, "mmdet", "3.3.0")
    assigner = det.MaxIoUAssigner()
    vars(assigner).update(pos_iou_thr=0.5, min_pos_iou=0.0, gt_max_assign_all=True)
    calculator = type("BboxOverlaps2D", (), {"dtype": None})()
    assigned = types.SimpleNamespace(priors=BOXES, bboxes=BOXES, labels=torch.zeros(3))
    result = module(monkeypatch, "mmdet.models.task_modules.assigners.assign_result")
    result.AssignResult = lambda *_: "ours"

    def nms(*_: Any, **__: Any) -> None: ...

    with dlops_triton.patch("mmcv"), dlops_triton.patch("mmdet"):
        idxs = torch.zeros(3)
        for kind in ("nms_rotated", nms, functools.partial(nms)):
            config = {"type": kind, "iou_threshold": 0.5}
            assert cv.batched_nms(BOXES, SCORES, idxs, config) == "original batched_nms"
        for more in ({}, {"type": "nms"}, {"type": cv.nms}):
            keep = cv.batched_nms(BOXES, SCORES, idxs, {"iou_threshold": 0.5} | more)[1]
            assert keep.tolist() == [1, 2]
        assert det.bbox_overlaps(BOXES, BOXES, is_aligned=True) == "original bbox_overlaps"
        assert torch.equal(det.bbox_overlaps(BOXES, BOXES), dlops_triton.box_iou(BOXES, BOXES))
        assert det.bbox_overlaps(BOXES, BOXES, "iou", False, 1.0) == "original bbox_overlaps"
        for negative, dtype, best in (
            (0.4, "fp16", 0.5),  # the calculator's dtype
            (0.6, None, 0.5),  # above the threshold of positives
            ([0.1, 0.4], None, 0.5),
            (0, None, 0.5),
            (0.4, None, 1.5),
        ):
            calculator.dtype = dtype
            vars(assigner).update(iou_calculator=calculator, neg_iou_thr=negative, pos_iou_thr=best)
            assert assigner.assign(assigned, assigned) == "original MaxIoUAssigner.assign"
        covered = {"neg_iou_thr": 0.4, "pos_iou_thr": 0.5, "ignore_iof_thr": -1}
        vars(assigner).update(covered, match_low_quality=True)
        assert assigner.assign(assigned, assigned) == "ours"
        for name, value in (
            ("gt_max_assign_all", False),
            ("perm_repeat_gt_cfg", {}),
            ("iou_calculator", types.SimpleNamespace(dtype=None)),
            ("min_pos_iou", -1.0),
        ):
            with monkeypatch.context() as only_here:
                only_here.setattr(assigner, name, value, raising=False)
                assert assigner.assign(assigned, assigned) == "original MaxIoUAssigner.assign"

        class Mine(det.MaxIoUAssigner):
            def assign_wrt_overlaps(self) -> None: ...

        assigner.__class__ = Mine
        assert assigner.assign(assigned, assigned) == "original MaxIoUAssigner.assign"


def test_rotated_boxes_go_to_torchvision(tv: Any) -> None:
    with dlops_triton.patch("torchvision"):
        assert tv.box_iou(BOXES, BOXES, fmt="cxcywhr") == "original box_iou"
        assert torch.equal(tv.box_iou(BOXES, BOXES), dlops_triton.box_iou(BOXES, BOXES))


# ---- mmcv-lite

LITE = {
    "__init__": "__version__ = '2.1.0'",
    "ops/__init__": """
        from .bbox import bbox_overlaps
        from .nms import batched_nms, nms, soft_nms
        from .roi_align import roi_align
    """,
    "ops/roi_align": """
        import mmcv._ext as ext
        assert hasattr(ext, "roi_align_forward")
        def roi_align(input): return ext.roi_align_forward(input)
    """,
}


@pytest.fixture
def lite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package like mmcv-lite: all of mmcv, but for ``mmcv._ext``."""
    functions: dict[str, str] = {}
    for op in _patch._PEERS["mmcv"].ops.values():
        where = op.module.removeprefix("mmcv.").replace(".", "/")
        functions[where] = functions.get(where, "import mmcv._ext\n") + (
            f"def {op.name}({plain(op.replacement)}): return mmcv._ext.{op.name}()\n"
        )
    for name, text in (LITE | functions).items():
        file = tmp_path / "mmcv" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(text))
    for name in [n for n in sys.modules if n.split(".")[0] == "mmcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "mmcv"]:
        del sys.modules[name]


@pytest.mark.usefixtures("lite")
def test_mmcv_lite() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r"call dlops_triton.install_mmcv_ops\(\) instead"
    ):
        dlops_triton.patch("mmcv")
    with dlops_triton.install_mmcv_ops() as done:
        from mmcv.ops import nms, roi_align  # type: ignore[import-not-found]

        assert len(done.replaced) == 8
        assert nms(BOXES, SCORES, 0.5)[1].tolist() == [1, 2]
        with pytest.raises(
            RuntimeError, match=r"mmcv's roi_align_forward needs .*has 'nms', 'soft_nms'"
        ):
            roi_align(BOXES)
        assert not hasattr(sys.modules["mmcv._ext"], "__file__")
        assert sys.modules["mmcv._ext"].get_compiler_version() == "not compiled"
        assert dlops_triton.install_mmcv_ops().replaced == {}
    from mmcv.ops import nms as original  # type: ignore[import-not-found]

    with pytest.raises(RuntimeError, match="mmcv's nms needs mmcv's compiled extension"):
        original(BOXES, SCORES, 0.5)


def test_no_mmcv_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install mmcv-lite"):
        dlops_triton.install_mmcv_ops()
