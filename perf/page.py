"""One HTML page with nothing outside it: its frame, its style, and tables that sort."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .ink import variables

# Nothing may be fetched from anywhere, whatever a row says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the number by which it sorts."""

    text: str
    value: float | None = None
    kind: str = ""  # a class of the style: "alert", "soft", "words"


@dataclass(frozen=True)
class Column:
    name: str
    hint: str = ""
    words: bool = False  # not numbers


def table(columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]], caption: str) -> str:
    """A table, with the caption given as HTML."""
    heads = "".join(map(_head, columns))
    body = "\n".join(
        "<tr>" + "".join(_cell(c, cell) for c, cell in zip(columns, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable">\n<caption>{caption}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _head(column: Column) -> str:
    hint = f' title="{escape(column.hint)}"' if column.hint else ""
    kind = _class("words" if column.words else "")
    return f'<th scope="col"{kind}{hint}>{escape(column.name)}</th>'


def _cell(column: Column, cell: Cell | str) -> str:
    if isinstance(cell, str):
        cell = Cell(cell)
    number = "" if cell.value is None else f' data-value="{cell.value:.9g}"'
    kind = _class(f"{'words' if column.words else ''} {cell.kind}".strip())
    return f"<td{kind}{number}>{escape(cell.text)}</td>"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def pill(status: str) -> str:
    """The word that says whether something was measured."""
    kind = "measured" if status == "measured" else "predicted"
    return f'<span class="pill {kind}">{escape(status)}</span>'


def document(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{variables()}
{_STYLE}
</style>
</head>
<body>
<main>
{body}
</main>
<script>
{_SCRIPT}
</script>
</body>
</html>
"""


_STYLE = """\
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 {
  font-size: 1.25rem; margin: 3.5rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .2em; }
code {
  font: .85em ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere;
}
:focus-visible { outline: 2px solid var(--measured0); outline-offset: 2px; }
.soft, .source { color: var(--soft); }
.source { font-size: .8rem; font-weight: 400; }
.alert { color: var(--alert); font-weight: 600; }
.pill {
  display: inline-block; font-size: .75rem; font-weight: 600; line-height: 1.5;
  padding: 0 .55em; border-radius: 1em; border: 1px solid; white-space: nowrap;
}
.pill.measured { color: var(--measured0); }
.pill.predicted { color: var(--predicted0); border-style: dashed; }
.scroll { overflow-x: auto; margin: 1rem 0 1.75rem; }
table {
  border-collapse: collapse; font-size: .82rem; line-height: 1.4;
  font-variant-numeric: tabular-nums;
}
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .5rem; white-space: nowrap; vertical-align: top; }
th {
  vertical-align: bottom; white-space: normal; color: var(--soft); font-weight: 600;
  border-bottom: 1px solid var(--soft);
}
td { border-bottom: 1px solid var(--line); }
th.words, td.words { text-align: left; }
td.long, td.wrap { white-space: normal; }
td.long { min-width: 22rem; }
td.wrap { min-width: 9rem; }
th:first-child, td:first-child { padding-left: 0; }
tbody tr:hover { background: color-mix(in srgb, var(--line) 45%, transparent); }
th button {
  all: unset; cursor: pointer; border-radius: 2px;
}
th button:focus-visible { outline: 2px solid var(--measured0); outline-offset: 2px; }
th button::after { content: "\\a0\\2195"; opacity: .45; }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; opacity: 1; }
figure { margin: 1.75rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 44rem; height: auto; }
figcaption { color: var(--soft); font-size: .8rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; margin-top: .75rem; }
dd { margin: 0; max-width: 46rem; }
@media (max-width: 40rem) { main { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.4rem; } }
@media print {
  main { max-width: none; padding: 0; }
  nav, th button::after { display: none; }
  .scroll, figure { overflow: visible; }
  table { font-size: .6rem; }
  th, td { padding: .15rem .3rem; white-space: normal; }
  td.long { min-width: 0; }
  tr, figure { break-inside: avoid; }
  figure svg { min-width: 0; }
}"""

_SCRIPT = """\
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const before = [...body.rows];
  const key = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };
  // Numbers before words, and what is empty last, whichever way a column is sorted.
  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      body.append(...[...before].sort((a, b) => compare(key(a, column), key(b, column), sign)));
    });
  });
}
// What is folded is printed all the same.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});"""
