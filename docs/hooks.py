"""What the site needs beyond mkdocs.yml, run by mkdocs and, for docstrings, by griffe.

Pages name what they show, and it is fetched from the one place where it is kept:

    <!-- from README.md: NMS -->    the section of that heading, without the heading
    <!-- from CHANGELOG.md -->      the whole file, without its first heading
    <!-- figures: nms -->           what perf/results has measured of an op, or else predicts

Formulas become MathML, which browsers draw without a script. Drawings of `pictures.py` are set into
the page, where they take its colours.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # mkdocs runs this file, it is no package's

import pictures  # noqa: E402

from dlops_triton.perf import ink, report, rows  # noqa: E402

# Where a link into the repository leads on the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "perf/README.md": "measuring.md",
}
PHOTOGRAPHS = sorted((ROOT / "examples/images").glob("*.*"))
MEASURED = sorted((ROOT / "perf/results").glob("*.svg"))
FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#1769d8" '
    'stroke-width="3"><path d="M2 2h13v13H2z"/><path d="M9 9h13v13H9z" opacity=".55"/></svg>'
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures, which lie elsewhere or are drawn now."""
    page_ground = "--ground: var(--md-default-bg-color);"
    style = "\n".join(
        f'[data-md-color-scheme="{scheme}"] {{ {ink.values(theme)} {page_ground} }}'
        for scheme, theme in (("default", "light"), ("slate", "dark"))
    )
    made = {"ink.css": style, "favicon.svg": FAVICON}
    made |= {f"{picture.name}.svg": ink.svg(picture) for picture in pictures.PICTURES}
    for name, text in made.items():
        files.append(File.generated(config, f"images/{name}", content=text))
    for file in (*PHOTOGRAPHS, *MEASURED):
        files.append(File.generated(config, f"images/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fetch what the page names."""
    here = posixpath.dirname(page.file.src_uri)

    def fetched(match: re.Match[str]) -> str:
        name, heading = match[1], match[2]
        text = (ROOT / name).read_text(encoding="utf-8")
        folder = posixpath.dirname(name)
        return _relinked(_section(text, heading, name), folder, here)

    markdown = re.sub(r"^<!-- from ([\w./]+)(?:: (.+))? -->$", fetched, markdown, flags=re.M)
    return re.sub(r"^<!-- figures: (\w+) -->$", lambda m: _figures(m[1]), markdown, flags=re.M)


def on_page_content(text: str, page: Any, config: Any, files: Any) -> str:
    """Formulas and drawings, of docstrings and of tables as well."""
    formula = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    text = re.sub(formula, _formula, text, flags=re.S)
    # Told apart by their header, for style.css.
    text = re.sub(
        r"<table>(?=\s*<thead>\s*<tr>\s*<th>case</th>\s*<th>try)", "<table data-cases>", text
    )
    names = {picture.name for picture in pictures.PICTURES} | {file.stem for file in MEASURED}

    def drawn(match: re.Match[str]) -> str:
        if match[2] not in names:
            raise PluginError(f"{page.file.src_uri} shows {match[2]}, which nothing draws")
        file = files.get_file_from_path(f"images/{match[2]}.svg")
        svg = re.sub(r"<style.*?</style>", "", file.content_string, flags=re.S)
        svg = re.sub(r' width="[^"]*" height="[^"]*"', "", svg, count=1)
        svg = re.sub(r'aria-label="[^"]*"', f'aria-label="{match[1]}"', svg, count=1)
        return f'<figure class="drawn" data-search-exclude>{svg}</figure>'

    image = r'<p><img alt="([^"]*)" src="[./]*images/([\w-]+)\.svg" ?/?></p>'
    return re.sub(image, drawn, text)


def _section(text: str, heading: str | None, name: str) -> str:
    """What stands below a heading, up to the next of its rank; of none: below the first."""
    lines = text.splitlines()
    fenced, rank, body = False, 0, []
    for line in lines:
        fenced ^= line.startswith("```")
        title = re.fullmatch(r"(#+) (.*)", line) if not fenced else None
        if rank and title and len(title[1]) <= rank:
            break
        if rank:
            body.append(line)
        elif title and heading in (None, title[2]):
            rank = len(title[1])
    if not rank:
        raise PluginError(f"{name} has no heading {heading!r}")
    return "\n".join(body).strip()


def _relinked(text: str, folder: str, here: str) -> str:
    """Relative links of a file of the repository, as the page at hand must write them."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if re.match(r"https?:|#", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if ROOT / path in (*PHOTOGRAPHS, *MEASURED):
            path = f"images/{posixpath.basename(path)}"
        elif path in PAGES:
            path = PAGES[path]
        else:
            raise PluginError(f"the site has no page for {path}")
        return f"]({posixpath.relpath(path, here or '.')})"

    # GitHub wants pipes escaped in the code of a table, Python-Markdown does not.
    text = re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), text)
    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def _figures(op: str) -> str:
    found = [row for row in rows.read(rows.files()) if row.get("op") == op]
    if not found:
        raise PluginError(f"perf/results has no rows of {op!r}")
    return f'<div class="figures" markdown>\n\n{report.markdown(found)}\n</div>'


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    drawn = convert(html.unescape(match[2]).strip(), display=display)
    if "\\" in drawn:
        raise PluginError(f"latex2mathml does not know all of {match[2]}")
    return drawn


# --- docstrings ------------------------------------------------------------------------------


def _public() -> dict[str, str]:
    """Where each public name is defined, from the imports of ``__init__``."""
    tree = ast.parse((ROOT / "dlops_triton/__init__.py").read_text(encoding="utf-8"))
    return {
        alias.name: f"dlops_triton.{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
    }


PUBLIC = _public()


class Docstrings(griffe.Extension):
    """Markdown for griffe: sections, formulas, links between ops."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _markdown(obj.docstring.value, obj)
        if isinstance(obj, griffe.Function):
            hidden = [p.name for p in obj.parameters if p.name.startswith("_")]
            for name in hidden:
                del obj.parameters[name]


def _markdown(text: str, obj: griffe.Object) -> str:
    text = re.sub(r"^\.\. math::\n((?:    .*\n?)+)", _block, text, flags=re.M)
    text = re.sub(r"^::\n\n((?: {4}.*\n|\n)+)", _example, text, flags=re.M)
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r":(?:func|class|meth):`([^`]+)`", r"`\1`", text)
    text = re.sub(
        r"^(Args|Attributes|Returns|Raises):\n((?:(?: {4}.*)?\n)*(?: {4}.*)?)",
        _described,
        text,
        flags=re.M,
    )

    def link(match: re.Match[str]) -> str:
        """A name of its module, else a public one, else a path."""
        name = match[1]
        if "." not in name and obj.path.startswith("dlops_triton.compat."):
            member = obj.module.members.get(name)
            defined = member is not None and not member.is_alias and not member.is_attribute
            path = f"{obj.module.path}.{name}" if defined else ""
        else:
            path = PUBLIC.get(name.removeprefix("dlops_triton."), "")
        if not path and re.match(r"dlops_triton\.(compat|nn)\.", name):
            path = name
        return f"[`{name}`][{path}]" if path and path != obj.path else match[0]

    return re.sub(r"(?<!`)`([\w.]+)`(?!`)", link, text)


def _block(match: re.Match[str]) -> str:
    return f"$$\n{match[1].strip()}\n$$\n"


def _example(match: re.Match[str]) -> str:
    code = re.sub(r"^ {4}", "", match[1].rstrip(), flags=re.M)
    return f"```python\n{code}\n```\n\n"


def _term(match: re.Match[str]) -> str:
    """The names that one description is of."""
    names = ", ".join(f"`{name}`" for name in re.findall(r"\w+", match[1]))
    return f"\n{names}\n:   "


def _described(match: re.Match[str]) -> str:
    """A list of "name: text", or free text."""
    title = {"Args": "Arguments"}.get(match[1], match[1])
    body = re.sub(r"^ {4}", "", match[2].rstrip(), flags=re.M)
    names = re.compile(r"^(\w+(?:,\s+\w+)*): ", re.M)
    if match[1] != "Returns":
        body = names.sub(_term, body)
    return f"\n**{title}**\n\n{body.strip()}\n\n"
