"""Puts the ops into an installed library, wherever its own have been imported."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .compat import _assigner, detectron2, mmcv, mmdet, torchvision

Function = Callable[..., Any]


class _Op(NamedTuple):
    """A function, or a method, "Class.method", of a module, and what replaces it."""

    module: str
    name: str
    replacement: Function
    # Whether the replacement takes these arguments; else they go to the original.
    takes: Function | None = None


class _Peer(NamedTuple):
    """Releases from ``oldest`` to ``newest``, both included, are known."""

    oldest: tuple[int, int]
    newest: tuple[int, int]
    ops: dict[str, _Op]


def _functions(namespace: Any, modules: dict[str, str]) -> dict[str, _Op]:
    return {
        name: _Op(module, name, getattr(namespace, name))
        for module, names in modules.items()
        for name in names.split()
    }


def _batched_nms_takes(
    boxes: Any, scores: Any, idxs: Any, nms_cfg: Any, class_agnostic: bool = False
) -> bool:
    return nms_cfg is None or mmcv.nms_type(nms_cfg) in ("nms", "soft_nms")


def _focal_loss_takes(
    self: Any, pred: Any, target: Any, weight: Any = None, *_: Any, **__: Any
) -> bool:
    learnt = target.requires_grad or (weight is not None and weight.requires_grad)
    return bool(self.use_sigmoid) and not self.activated and not learnt


def _overlaps_take(
    bboxes1: Any, bboxes2: Any, mode: str = "iou", is_aligned: bool = False, eps: float = 1e-6
) -> bool:
    # ``eps``, which is not used each with each, is what no area of pixels is below.
    return not is_aligned and eps <= 1e-6


def _assigner_takes(self: Any, *_: Any, **__: Any) -> bool:
    calculator = self.iou_calculator
    # A list, or an integer, which mmdet takes for no threshold.
    negative = self.neg_iou_thr[-1] if isinstance(self.neg_iou_thr, tuple) else self.neg_iou_thr
    return (
        type(self).assign_wrt_overlaps.__module__.startswith("mmdet.")
        and type(calculator).__name__ == "BboxOverlaps2D"
        and calculator.dtype is None
        and self.gt_max_assign_all
        and getattr(self, "perm_repeat_gt_cfg", None) is None
        and isinstance(negative, float)
        and 0 <= negative <= self.pos_iou_thr <= 1
        and 0 <= self.min_pos_iou <= 1
    )


def _mmdet_assign(
    self: Any, pred_instances: Any, gt_instances: Any, gt_instances_ignore: Any = None, **_: Any
) -> Any:
    result = importlib.import_module("mmdet.models.task_modules.assigners.assign_result")
    num_gts, gt_inds, max_overlaps, labels = _assigner.assign(
        self, pred_instances, gt_instances, gt_instances_ignore
    )
    return result.AssignResult(num_gts, gt_inds, max_overlaps, labels)


_LOSSES = "mmdet.models.losses."
_PEERS = {
    "torchvision": _Peer(
        (0, 15),
        (0, 29),
        _functions(
            torchvision,
            {
                "torchvision.ops.boxes": "nms batched_nms box_iou generalized_box_iou "
                "distance_box_iou complete_box_iou",
                "torchvision.ops.focal_loss": "sigmoid_focal_loss",
                "torchvision.ops.giou_loss": "generalized_box_iou_loss",
                "torchvision.ops.diou_loss": "distance_box_iou_loss",
                "torchvision.ops.ciou_loss": "complete_box_iou_loss",
                "torchvision.ops.deform_conv": "deform_conv2d",
            },
        ),
    ),
    "mmcv": _Peer(
        (2, 0),
        (2, 3),
        _functions(
            mmcv,
            {
                "mmcv.ops.nms": "nms soft_nms",
                "mmcv.ops.bbox": "bbox_overlaps",
                "mmcv.ops.focal_loss": "sigmoid_focal_loss softmax_focal_loss",
                "mmcv.ops.deform_conv": "deform_conv2d",
                "mmcv.ops.modulated_deform_conv": "modulated_deform_conv2d",
            },
        )
        | {"batched_nms": _Op("mmcv.ops.nms", "batched_nms", mmcv.batched_nms, _batched_nms_takes)},
    ),
    "mmdet": _Peer(
        (3, 0),
        (3, 3),
        {
            "FocalLoss": _Op(
                _LOSSES + "focal_loss",
                "FocalLoss.forward",
                mmdet.focal_loss_forward,
                _focal_loss_takes,
            ),
            "GHMC": _Op(_LOSSES + "ghm_loss", "GHMC.forward", mmdet.ghmc_forward),
            "GHMR": _Op(_LOSSES + "ghm_loss", "GHMR.forward", mmdet.ghmr_forward),
            "giou_loss": _Op(_LOSSES + "iou_loss", "giou_loss", mmdet.giou_loss),
            "diou_loss": _Op(_LOSSES + "iou_loss", "diou_loss", mmdet.diou_loss),
            "bbox_overlaps": _Op(
                "mmdet.structures.bbox.bbox_overlaps",
                "bbox_overlaps",
                mmdet.bbox_overlaps,
                _overlaps_take,
            ),
            "MaxIoUAssigner": _Op(
                "mmdet.models.task_modules.assigners.max_iou_assigner",
                "MaxIoUAssigner.assign",
                _mmdet_assign,
                _assigner_takes,
            ),
        },
    ),
    "detectron2": _Peer(
        (0, 6),
        (0, 6),
        _functions(
            detectron2,
            {
                "detectron2.layers.nms": "batched_nms",
                "detectron2.layers.losses": "diou_loss ciou_loss",
                "detectron2.layers.deform_conv": "deform_conv modulated_deform_conv",
                "detectron2.structures.boxes": "pairwise_iou",
                "fvcore.nn.focal_loss": "sigmoid_focal_loss sigmoid_focal_loss_jit",
                "fvcore.nn.giou_loss": "giou_loss",
            },
        ),
    ),
}


class Patch:
    """What :func:`patch` has replaced, until :meth:`undo`, or the end of a ``with`` block.

    Attributes:
        library: the library's name.
        version: its release.
        replaced: for each op, where it has been replaced: "module.name".
        already: ops that an earlier patch had replaced, and that are left to it.

    ``print`` shows all of it.
    """

    def __init__(self, library: str, version: str):
        self.library = library
        self.version = version
        self.replaced: dict[str, list[str]] = {}
        self.already: list[str] = []
        self._undo: list[tuple[Any, str, Function, Function]] = []

    def undo(self) -> None:
        """Put the originals back, also where the ops have been imported since. May be repeated.

        What someone else has replaced since then stays.
        """
        for owner, name, original, replacement in self._undo:
            if owner is not None and vars(owner).get(name) is replacement:
                setattr(owner, name, original)
        originals = {id(replacement): original for _, _, original, replacement in self._undo}
        for module, key, replacement in _places([undone[3] for undone in self._undo]):
            vars(module)[key] = originals[id(replacement)]
        self._undo.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        places = sum(map(len, self.replaced.values()))
        lines = [
            f"{self.library} {self.version}: {len(self.replaced)} ops replaced in {places} places"
        ]
        width = max(map(len, (*self.replaced, *self.already)), default=0)
        for op, found in self.replaced.items():
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            lines.append(f"  {op:{width}}  {', '.join(found[:3])}{more}")
        lines += [f"  {op:{width}}  by an earlier patch" for op in self.already]
        return "\n".join(lines)

    __repr__ = __str__


def patch(library: str, ops: Sequence[str] | None = None) -> Patch:
    """Replace a library's ops with these, everywhere they have been imported.

    ::

        print(dlops_triton.patch("torchvision"))       # for the rest of the program
        with dlops_triton.patch("mmcv", ["nms"]):      # for a while
            ...

    Args:
        library: "torchvision", "mmcv", "mmdet" or "detectron2" (with what it uses of fvcore). A
            library does not stand for those below it: of a project on mmdet patch mmcv as well, of
            one on detectron2 torchvision.
        ops: the ops to replace, by the library's names; by default all that there are.

    Returns:
        A :class:`Patch`, which says what has been replaced, undoes it, and is a context manager.

    Raises:
        ValueError: an unknown library or op.
        ModuleNotFoundError: the library is not installed, or cannot be imported.
        RuntimeError: its release is not known, or an op is not there, or has another signature.
            Nothing has been replaced then.

    Functions are replaced in the globals of all modules that hold them, those of the program
    included, and methods (of mmdet's losses and assigner) in their class, so that modules that
    exist already follow. References elsewhere (in a ``functools.partial``, a container, a scripted
    module) keep the original. What an op does not cover (rotated boxes, ...) goes to the original.
    Ops that are replaced already stay as they are, so it may be called twice. docs/differences.md
    tells how answers differ.
    """
    if library not in _PEERS:
        raise ValueError(f"library must be one of {_listed(_PEERS)}, got {library!r}")
    peer = _PEERS[library]
    if isinstance(ops, str) or not all(op in peer.ops for op in ops or ()):
        raise ValueError(f"ops must be a list of {_listed(peer.ops)}, got {ops!r}")
    done = Patch(library, _version(library, peer))
    found = []
    for op in peer.ops if ops is None else dict.fromkeys(ops):
        owner, name, original = _resolve(library, peer.ops[op])
        if hasattr(original, "_dlops_original"):
            done.already.append(op)
            continue
        _check_signature(done, op, original, peer.ops[op].replacement)
        found.append((op, owner, name, original, _prepared(peer.ops[op], original)))
    places = _places([original for _, owner, _, original, _ in found if owner is None])
    for op, owner, name, original, replacement in found:
        if owner is not None:
            setattr(owner, name, replacement)
            done.replaced[op] = [f"{owner.__module__}.{owner.__name__}.{name}"]
        else:
            held = [(module, key) for module, key, function in places if function is original]
            for module, key in held:
                vars(module)[key] = replacement
            done.replaced[op] = sorted(f"{module.__name__}.{key}" for module, key in held)
        done._undo.append((owner, name, original, replacement))
    return done


def install_mmcv_ops() -> Patch:
    """Make ``mmcv.ops`` work where only ``mmcv-lite`` is installed, without a compiled extension.

    Call it before anything imports ``mmcv.ops`` (mmdet does). The extension is then a stand-in,
    from which mmcv's own modules import; the ops that this library has are replaced as
    ``patch("mmcv")`` replaces them, and every other function of the extension raises an error that
    names it, when it is called. Where mmcv has its extension this is ``patch("mmcv")``.

    Returns:
        The :class:`Patch`. Undoing it leaves the stand-in.

    Raises:
        ModuleNotFoundError: neither mmcv nor mmcv-lite is installed.
        RuntimeError: its release is not known.
    """
    if importlib.util.find_spec("mmcv") is None:
        raise ModuleNotFoundError("mmcv is not installed: pip install mmcv-lite")
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        stand_in = types.ModuleType("mmcv._ext", "Stands in for mmcv's compiled extension.")
        stand_in.__getattr__ = _absent  # type: ignore[method-assign]
        for name in ("get_compiler_version", "get_compiling_cuda_version"):
            setattr(stand_in, name, lambda: "not compiled")  # what collect_env prints
        sys.modules["mmcv._ext"] = stand_in
        vars(importlib.import_module("mmcv"))["_ext"] = stand_in
    return patch("mmcv")


def _absent(name: str) -> Function:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"mmcv's {name} needs mmcv's compiled extension, which is not installed; dlops_triton "
            f"has {_listed(_PEERS['mmcv'].ops)}"
        )

    return absent


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _version(library: str, peer: _Peer) -> str:
    """The library's release, if it is known."""
    version = str(getattr(_imported(library, library), "__version__", "0.0"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not peer.oldest <= release <= peer.newest:
        oldest, newest = (".".join(map(str, known)) for known in (peer.oldest, peer.newest))
        raise RuntimeError(
            f"{library} {version} is too {'old' if release < peer.oldest else 'new'} to be known: "
            f"this version of dlops_triton patches {library} {oldest} to {newest}"
        )
    return version


def _imported(library: str, module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == "mmcv._ext":
            raise ModuleNotFoundError(
                "mmcv is installed without its compiled extension (mmcv-lite): call "
                "dlops_triton.install_mmcv_ops() instead",
                name=error.name,
            ) from error
        why = "is not installed" if error.name == library else f"cannot be imported: {error}"
        raise ModuleNotFoundError(f"{library} {why}", name=error.name) from error
    except Exception as error:  # torchvision for another torch, mmdet for another mmcv
        raise ModuleNotFoundError(f"{library} cannot be imported: {error}", name=library) from error


def _resolve(library: str, op: _Op) -> tuple[type | None, str, Function]:
    """The class of a method, or None; the attribute's name; and what it is now."""
    module = _imported(library, op.module)
    owner_name, _, name = op.name.rpartition(".")
    owner = getattr(module, owner_name, None) if owner_name else None
    found = getattr(owner if owner_name else module, name, None)
    if found is None:
        raise RuntimeError(f"{library} has no {op.module}.{op.name}, which is to be replaced")
    return owner, name, found


def _check_signature(done: Patch, op: str, original: Function, replacement: Function) -> None:
    """The original's arguments must be the replacement's first ones."""
    known, takes = _arguments(original), _arguments(replacement)
    if takes[: len(known)] != known:
        raise RuntimeError(
            f"{op} of {done.library} {done.version} has arguments that are not known: "
            f"({', '.join(known)}), not ({', '.join(takes)})"
        )


def _arguments(function: Any) -> list[str]:
    """The names of a function's arguments, but for those that collect the rest."""
    if isinstance(function, torch.jit.ScriptFunction):
        return [argument.name for argument in function.schema.arguments]  # type: ignore[attr-defined]
    # ``apply`` of an autograd.Function takes what its ``forward`` takes after the context.
    skip = hasattr(function, "__self__")
    function = function.__self__.forward if skip else function
    collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names: list[str] = []
    # A decorator's own arguments count, where it names any.
    for follow in (False, True):
        signature = inspect.signature(function, follow_wrapped=follow)
        parameters = signature.parameters.values()
        names = names or [p.name for p in parameters if p.kind not in collecting]
    return names[skip:]


def _prepared(op: _Op, original: Function) -> Function:
    """A function of its own, so that undoing finds it and nothing else."""
    source = op.replacement
    if op.takes is not None:
        replacement = _falling_back(source, op.takes, original)
    else:
        assert isinstance(source, types.FunctionType)
        replacement = types.FunctionType(
            *(source.__code__, source.__globals__, source.__name__),
            *(source.__defaults__, source.__closure__),
        )
        replacement.__kwdefaults__ = source.__kwdefaults__
    for name in ("__name__", "__doc__", "__annotations__"):
        setattr(replacement, name, getattr(source, name))
    replacement.__dict__.update(vars(source))
    # A pickle refers to it by the original's name.
    replacement.__module__, replacement.__qualname__ = op.module, op.name
    replacement._dlops_original = original  # type: ignore[attr-defined]
    return replacement


def _falling_back(source: Function, takes: Function, original: Function) -> types.FunctionType:
    @functools.wraps(source)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return (source if takes(*args, **kwargs) else original)(*args, **kwargs)

    return replacement  # type: ignore[return-value]


def _places(functions: Iterable[Function]) -> list[tuple[types.ModuleType, str, Function]]:
    """The globals that are one of the functions, and which."""
    wanted = {id(function) for function in functions}
    # By identity: a module may have several names, as __main__ does. Copies: threads may import.
    modules = {
        id(module): module
        for name, module in sys.modules.copy().items()
        if isinstance(module, types.ModuleType) and name.partition(".")[0] != "dlops_triton"
    }
    return [
        (module, key, value)
        for module in modules.values()
        for key, value in vars(module).copy().items()
        if id(value) in wanted
    ]
