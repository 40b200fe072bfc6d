"""What the documentation shows runs, its tables hold, and no public name is left out."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dlops_triton
from dlops_triton import compat, nn

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
# | case | `expression` | `what it gives` |
ROW = re.compile(r"^\| [^|]* \| `([^`]+)` \| `([^`]+)` \|$", re.M)


def outcome(expression: str, names: dict[str, Any]) -> str:
    try:
        return repr(eval(expression, names))
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_do_as_they_say(page: Path, device: torch.device) -> None:
    """A page's blocks run in order, and its rows with the names these have made."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with torch.device(device):
        for block in BLOCK.findall(text):
            exec(compile(block, page.name, "exec"), names)
        wrong = {e: was for e, said in ROW.findall(text) if (was := outcome(e, names)) != said}
    assert not wrong
    header = re.compile(r"^\| case \| try \| result \|\n\|[-|]+\n((?:\|.*\n)+)", re.M)
    lines = "".join(header.findall(text)).splitlines()
    assert len(lines) == len(ROW.findall(text)), "a row that is no test"


def test_every_op_has_a_table_a_formula_and_a_picture() -> None:
    pages = sorted((DOCS / "ops").glob("*.md"))
    families = (DOCS.parent / "kernels").glob("[a-z]*.py")
    assert {page.stem for page in pages} == {file.stem for file in families}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert len(ROW.findall(text)) >= 10, page.name
        assert "\n$$\n" in text, page.name
        assert f"](../images/{page.stem}.svg)" in text, page.name


def paths(value: Any) -> set[str]:
    """Where a name is defined; a package's modules."""
    if isinstance(value, ModuleType):
        return {f"{value.__name__}.{name}" for name in value.__all__}
    return {f"{value.__module__}.{value.__name__}"}


def test_every_public_name_is_on_some_page() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = set(re.findall(r"^::: ([\w.]+)$", text, re.M))
    public = [getattr(dlops_triton, name) for name in dlops_triton.__all__]
    public += [
        value
        for name, value in vars(nn).items()
        if getattr(value, "__module__", "") == nn.__name__ and not name.startswith("_")
    ]
    assert len(public) > 20
    missing = set().union(*map(paths, public)) - shown
    assert not missing


def test_every_difference_is_on_its_page() -> None:
    """What says in its docstring that it differs from its peer is named there."""
    text = (DOCS / "differences.md").read_text(encoding="utf-8")
    names: dict[Any, list[str]] = {}  # of what two libraries share, both
    for library in compat.__all__:
        module = getattr(compat, library)
        for name in module.__all__:
            value = getattr(module, name)
            if "Differs from" in (value.__doc__ or ""):
                names.setdefault(value, []).append(f"`{library}.{name}`")
    assert len(names) > 15
    assert not [n for n in names.values() if not any(name in text for name in n)]
