"""What holds for every op: registration, compilation, imports, the README."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dlops_triton
from dlops_triton import (
    _dispatch,
    batched_nms,
    box_iou,
    box_match,
    complete_box_iou,
    complete_box_iou_loss,
    deform_conv2d,
    deform_sample,
    distance_box_iou_loss,
    generalized_box_iou,
    generalized_box_iou_loss,
    ghmc_loss,
    ghmr_loss,
    nms,
    nms_padded,
    sigmoid_focal_loss,
    soft_nms,
    soft_nms_padded,
    softmax_focal_loss,
)

ROOT = Path(__file__).parents[1]
OPS = torch.ops.dlops


def boxes(n: int, device: torch.device | str = "cpu") -> Tensor:
    torch.manual_seed(n)
    corner = torch.rand(n, 2, device=device) * 50
    return torch.cat([corner, corner + torch.rand(n, 2, device=device) * 30], 1)


# ---- registration


def test_opcheck(device: torch.device) -> None:
    x = torch.randn(9, 5, device=device)
    labels = torch.arange(9, device=device) % 6
    weight = torch.rand(9, device=device)
    a, b = boxes(7, device), boxes(6, device)
    grad = torch.randn(7, 6, device=device)
    scores, idxs = torch.rand(7, device=device), torch.arange(7, device=device) % 2
    focal = (0.25, 2.0, -100, 0.0)
    pairs = ([2, 1], [1, 1], [0, 0], [1, 2])
    image, kernels, offset, mask, columns, out = (
        torch.randn(size, device=device)
        for size in (
            *((2, 4, 3, 3), (6, 2, 2, 1), (2, 8, 2, 3), (2, 4, 2, 3), (2, 8, 6), (2, 6, 2, 3)),
        )
    )
    image = image.contiguous(memory_format=torch.channels_last)
    for op, arguments in (
        (OPS.focal_fwd.default, (x, labels, None, *focal, False)),
        (OPS.focal_fwd.default, (x.mT, x.mT.sigmoid(), None, None, *focal[1:], True)),
        (OPS.focal_bwd.default, (torch.randn(9, 5, device=device), x, labels, weight, *focal)),
        (OPS.focal_bwd.default, (torch.tensor(1.0, device=device), x, labels, None, *focal)),
        (OPS.focal_sum.default, ([x, x.mT], [labels, labels[:5]], None, 1.0, *focal[:3], True)),
        (OPS.focal_sum.default, ([x], [labels], weight[:1], 0.5, *focal[:3], False)),
        (OPS.loss_scale_.default, (x.clone(), weight[0])),
        (OPS.softmax_focal.default, (x, labels, None, None, None, 2.0, -100, 0.0, *(True,) * 3)),
        (
            OPS.softmax_focal.default,
            (
                *(x.mT.contiguous().mT, labels, torch.rand(2, 5, device=device), weight, weight),
                *(0.5, -100, 0.1, False, True, False),
            ),
        ),
        (OPS.box_iou_fwd.default, (a, b, 0, "iou", 0.0)),
        (
            OPS.box_iou_fwd.default,
            (a.half().expand(3, 7, 4), b.half().expand(3, 6, 4), 1, "ciou", 1e-7),
        ),
        (OPS.box_iou_bwd.default, (grad, a, b, 0, "diou", 1e-7, True)),
        (OPS.box_iou_bwd.default, (grad.mT, b, a, 1, "iof", 0.0, False)),
        (OPS.iou_loss_fwd.default, (a[:6], b, "giou", "none", 1e-7)),
        (OPS.iou_loss_fwd.default, (a.half().mT.contiguous().mT, a.half(), "diou", "mean", 1e-7)),
        (OPS.iou_loss_bwd.default, (grad[0], b, b + 1, "ciou", "none", 0.0, True, True)),
        (OPS.iou_loss_bwd.default, (scores[0], a, a + 1, "giou", "sum", 1e-7, False, True)),
        (OPS.box_match.default, (a[None], b[None], None, 0.5, 0.4, 0.0, True)),
        (
            OPS.box_match.default,
            (
                *(a.half().expand(3, 7, 4), b.half().expand(3, 6, 4), idxs[:6].bool().expand(3, 6)),
                *(0.5, 0.5, 0.25, False),
            ),
        ),
        (OPS.nms.default, (a, scores, None, 0.5, 0, None, None)),
        (OPS.nms.default, (a.mT.contiguous().mT, scores, idxs, 0.5, 1, 0.2, 3)),
        (OPS.nms_padded.default, (a[None], scores[None], None, None, 0.5, 0, None, 4)),
        (
            OPS.nms_padded.default,
            (
                *(a.half().expand(3, 7, 4), scores.expand(3, 7), idxs.expand(3, 7), idxs[:3]),
                *(0.5, 1, 0.2, 9),
            ),
        ),
        (OPS.soft_nms.default, (a, scores, None, 0.3, 0.5, 0.001, "gaussian", 0, None)),
        (OPS.soft_nms.default, (a, scores.half(), idxs, 0.3, 0.5, 0.2, "linear", 1, 3)),
        (
            OPS.soft_nms_padded.default,
            (
                *(a.half().expand(3, 7, 4), scores.expand(3, 7), idxs.expand(3, 7), idxs[:3]),
                *(0.3, 0.5, 0.2, "hard", 1, 9),
            ),
        ),
        (OPS.deform_sample_fwd.default, (image, offset, None, *pairs)),
        (
            OPS.deform_sample_bwd.default,
            (columns, image, offset, mask, *pairs, [True, False, True]),
        ),
        (
            OPS.deform_conv_fwd.default,
            (image.half(), offset, mask, kernels.half(), None, *pairs[1:], None),
        ),
        (
            OPS.deform_conv_fwd.default,
            (image, offset, None, kernels, weight[:6], *pairs[1:], "fused"),
        ),
        (
            OPS.deform_conv_bwd.default,
            (out, image, offset, mask, kernels, *pairs[1:], [False, True, True, True], "fused"),
        ),
        (
            OPS.deform_conv_bwd.default,
            (
                *(out, image, offset, None, torch.randn(6, 4, 2, 1, device=device), *pairs[1:]),
                *([True, True, False, True], "columns"),
            ),
        ),
    ):
        torch.library.opcheck(op, arguments)


def test_what_mutates_always_has_something_to_mutate() -> None:
    """Inductor fails on an op all of whose mutable arguments are None."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("dlops::")]
    assert len(schemas) > 20
    for schema in schemas:
        mutable = [a.type for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert not mutable or any(t.kind() != "OptionalType" for t in mutable), schema


class Everything(nn.Module):
    """A model's worth of calls."""

    def forward(self, x: Tensor, labels: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        loss = sigmoid_focal_loss(x * 2, labels, gamma=1.5, reduction="mean", avg_factor=x.shape[0])
        each = sigmoid_focal_loss(x, x.detach().sigmoid())
        mutual = (
            softmax_focal_loss(x, labels, alpha=0.5)
            + softmax_focal_loss(x, labels, reduction="none").sum()
        )
        harmonized = ghmc_loss(x, labels) + ghmr_loss(x, x.detach() + 1)
        boxed = (
            complete_box_iou_loss(a, a.detach() + 1, "mean")
            + distance_box_iou_loss(a.detach(), a + 1, "sum")
            + generalized_box_iou_loss(a, a.roll(1, 0)).sum()
        )
        iou = box_iou(a, b + 1) + generalized_box_iou(a, b) - complete_box_iou(a, b + 2)
        kept = batched_nms(a, x[:, 0], labels, 0.5, score_threshold=-1.0)
        best = nms(a, x[:, 1], 0.3, max_output=a.shape[0] // 2)
        matched, overlap = box_match(a, b.expand(2, -1, -1), gt_valid=b[:, 0].ge(9).expand(2, -1))
        found = (kept, best, matched, overlap, *box_match(a, b, match_low_quality=False))
        a2, x2 = a.expand(2, -1, -1), x[:, :2].mT
        valid = labels[:2]
        found += nms_padded(a2, x2, 0.4, idxs=labels.expand(2, -1), max_output=7)
        found += nms_padded(a2, x2, 0.4, valid=valid, max_output=a.shape[0])
        found += soft_nms(a, x[:, 0].sigmoid(), idxs=labels)
        found += soft_nms_padded(a2, x2.sigmoid(), valid=valid, max_output=30)
        # In fp64, which autocast leaves alone.
        image = x.double()[:, :, None, None]
        offset, weights = image.detach()[:, :2].tanh(), image.new_ones(2, 5, 1, 1)
        sampled = deform_sample(image, offset, 1).sum()
        convolved = deform_conv2d(image, offset, weights, padding=1, stride=3, mask=offset[:, :1])
        deformed = (sampled + convolved.sum()).float()
        return loss + mutual + harmonized + boxed + deformed, each + 0, iou.max(1).values, *found


def everything(device: torch.device, n: int) -> tuple[Tensor, ...]:
    torch.manual_seed(n)
    x = torch.randn(n, 5, device=device, requires_grad=True)
    labels = torch.randint(0, 7, (n,), device=device)
    return x, labels, boxes(n, device).requires_grad_(), boxes(n + 2, device).requires_grad_()


def gradients(results: tuple[Tensor, ...], arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    loss, each, best, *_ = results
    leaves = [t for t in arguments if t.requires_grad]
    return torch.autograd.grad(loss + each.sum() + best.sum(), leaves)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU: test_torch_compile.py")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_inductor_takes_the_whole_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    device, model = torch.device("cuda"), Everything()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="inductor")
    for n in (20, 33):
        arguments = everything(device, n)
        want, got = model(*arguments), compiled(*arguments)
        for x, y in zip(want, got, strict=True):
            torch.testing.assert_close(x, y)
        for x, y in zip(gradients(want, arguments), gradients(got, arguments), strict=True):
            torch.testing.assert_close(x, y)


# ---- the house


def test_imports_only_point_down() -> None:
    allowed = {
        "kernels": {"triton"},
        "reference": {"numpy", "typing", "__future__"},
    }
    for folder, names in allowed.items():
        for file in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    if node.level:
                        parts = ("_boxes", "_deform", "_ghm", "_loss", "_math", "_nms")
                        shared = {("kernels", part) for part in parts} | {("reference", "_boxes")}
                        assert (folder, node.module) in shared, file
                        continue
                    found = {str(node.module).split(".")[0]}
                else:
                    continue
                assert found <= names, f"{file.name} imports {found - names}"


def test_one_name_for_every_module() -> None:
    """`import kernels` from the repository's root would load a second copy of everything."""
    pattern = re.compile(r"^\s*(?:from|import)\s+(?:kernels|reference|perf)\b", re.M)
    for file in ROOT.glob("*/**/*.py"):
        if ".venv" not in file.parts and "build" not in file.parts:
            assert not pattern.search(file.read_text()), file


def test_families_have_a_file_in_every_room() -> None:
    stems = {f.stem for f in (ROOT / "kernels").glob("[a-z]*.py")}
    for room, name in (
        ("reference", "{}.py"),
        ("dlops_triton", "{}.py"),
        ("perf", "{}.py"),
        ("tests", "test_{}.py"),
    ):
        missing = [s for s in stems if not (ROOT / room / name.format(s)).exists()]
        assert not missing, f"{room} lacks {missing}"


def test_kernels_and_files_stay_small() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 75, f"{file.name}: {node.name}"
                assert len(node.args.args) <= 16, f"{file.name}: {node.name}"
    for file in ROOT.glob("*/**/*.py"):
        if ".venv" not in file.parts and "build" not in file.parts:
            assert len(file.read_text().splitlines()) <= 450, file


def test_no_kernel_returns_none() -> None:
    """Triton 3.6 takes no ``return None``, alone or among others; later ones compile it."""
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Return) and node.value is not None:
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                none = [v for v in values if isinstance(v, ast.Constant) and v.value is None]
                assert not none, f"{file.name}, line {node.lineno}"


def test_every_public_name_is_documented() -> None:
    for name in dlops_triton.__all__:
        value = getattr(dlops_triton, name)
        assert value.__doc__
        if callable(value) and not isinstance(value, type):
            assert not inspect.signature(value).parameters or "Args:" in value.__doc__, name
            assert "Returns:" in value.__doc__, name


@pytest.mark.parametrize("library", dlops_triton.compat.__all__)
def test_every_name_of_compat_is_documented(library: str) -> None:
    namespace = getattr(dlops_triton.compat, library)
    for name in namespace.__all__:
        value = getattr(namespace, name)
        assert value.__doc__, name
        if not isinstance(value, type):
            assert "Args:" in value.__doc__, name
            assert "Returns:" in value.__doc__, name


def test_implementation_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")
    assert dlops_triton.implementation("cpu") == "numpy reference on CPU"
    monkeypatch.setattr(_dispatch, "cpu_implementation", "kernel")
    assert re.fullmatch(r"Triton [\d.]+ interpreter on CPU", dlops_triton.implementation("cpu"))
    with pytest.raises(ValueError, match="got 'mps'"):
        dlops_triton.implementation("mps")


def test_a_cpu_user_needs_no_switch() -> None:
    """Without the interpreter CPU tensors go to the reference, in a process of its own."""
    program = (
        "import torch, dlops_triton as d;"
        "assert d.implementation('cpu') == 'numpy reference on CPU';"
        "b = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8]]);"
        "print(d.nms(b, torch.tensor([.5, .9]), .5).tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "[1]\n"


def examples() -> list[str]:
    readme = ROOT / "README.md"
    return re.findall(r"```python\n(.*?)```", readme.read_text(), re.S) if readme.exists() else []


@pytest.mark.parametrize("example", examples())
def test_readme_examples_run(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the reference, as on a newcomer's laptop."""
    monkeypatch.setattr(_dispatch, "cpu_implementation", "reference")
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})
