"""What is published says one thing: the version, the changelog, the description, the packages."""

from __future__ import annotations

import datetime
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import dlops_triton
from tests.tools.oldest import minimum

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_version_is_stated_once() -> None:
    """In ``dlops_triton.__version__``, which the build reads; the changelog has its history."""
    version = dlops_triton.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc|\.dev)\d+)?", version)
    alone = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.]*\d)")
    stating = [
        str(file.relative_to(ROOT))
        for pattern in ("*.py", "*.toml", "*.md", "*.txt", "Makefile", "*/**/*.py", "*/**/*.md")
        for file in ROOT.glob(pattern)
        if not {".venv", "build"} & set(file.parts) and alone.search(file.read_text())
    ]
    assert set(stating) - {"CHANGELOG.md"} == {"dlops_triton/__init__.py"}
    assert 'version = { attr = "dlops_triton.__version__" }' in PYPROJECT


def test_the_changelog_is_kept() -> None:
    """Keep a Changelog: what is unreleased first, then versions, the newest first."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = headings[1:] if headings[0] == "[Unreleased]" else headings
    found = [
        re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", line) for line in released
    ]
    assert all(found), headings
    numbers = [tuple(map(int, match.groups()[:3])) for match in found if match]
    dates = [datetime.date.fromisoformat(match[4]) for match in found if match]
    assert numbers == sorted(set(numbers), reverse=True)
    assert dates == sorted(dates, reverse=True)
    # Of this version, or of what will be it.
    assert headings[0] == "[Unreleased]" or headings[0].startswith(f"[{dlops_triton.__version__}]")
    kinds = re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_package_is_packed() -> None:
    folders = (file.parent for file in (ROOT / "dlops_triton").glob("*/__init__.py"))
    packed = re.findall(r'^    "(dlops_triton[\w.]*)",$', PYPROJECT, re.M)
    assert set(packed) == {"dlops_triton", *(f"dlops_triton.{folder.name}" for folder in folders)}


def test_oldest_versions_are_read_from_one_place() -> None:
    assert [minimum(name) for name in ("torch", "triton", "numpy")] == re.findall(
        r">=([\d.]+)", re.findall(r"^dependencies = .*$", PYPROJECT, re.M)[0]
    )
    (python,) = re.findall(r'requires-python = ">=3\.(\d+)"', PYPROJECT)
    classified = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PYPROJECT)
    assert classified == [str(minor) for minor in range(int(python), int(classified[-1]) + 1)]
    assert f'target-version = "py3{python}"' in PYPROJECT


def setup_file() -> ModuleType:
    """As the build runs it, but for the build."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("_setup", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_index_is_shown_no_link_that_leads_nowhere() -> None:
    description = setup_file().description
    given = """# A

![Alt](images/a.png)

See [this](CONTRIBUTING.md), [that](https://example.org/x) and [below](#b).
![far](https://example.org/a.png)

```python
x[0](y)  # [z](w)
```

## B
"""
    assert (
        description(given)
        == """# A

See this, [that](https://example.org/x) and [below](#b).
![far](https://example.org/a.png)

```python
x[0](y)  # [z](w)
```

## B
"""
    )
    readme = ROOT / "README.md"
    if readme.exists():
        whole = readme.read_text()
        shown = description(whole)
        assert re.findall(r"^#+ .*$", shown, re.M) == re.findall(r"^#+ .*$", whole, re.M)
        assert re.findall(r"```.*?```", shown, re.S) == re.findall(r"```.*?```", whole, re.S)
        prose = re.sub(r"```.*?```", "", shown, flags=re.S)
        assert not re.search(r"\]\((?!https?://|#)", prose)
        assert "<img" not in prose
