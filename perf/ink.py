"""Colours, and drawings as SVG that follow the reader's light or dark ground, or as PNG.

A drawing names its colours by role. For SVG each role is drawn in a colour that stands for it and
that becomes a CSS variable afterwards; for PNG the colours are those of one ground. Measurements
and predictions have colours of their own. All have a contrast of 3 or more on their ground, and
the first of each family stay apart for colour-blind eyes; marks and labels say the same again.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import OPS

# By role, on a light and on a dark ground.
_COLOURS = {
    "ground": ("#ffffff", "#15171b"),
    "ink": ("#1b1f24", "#e7e9ec"),
    "soft": ("#59626d", "#a3abb5"),
    "line": ("#dfe3e8", "#30353c"),
    "peer": ("#7b8490", "#8b95a1"),
    "alert": ("#c0182f", "#ff6b78"),
    "measured0": ("#1769d8", "#5aa2f7"),
    "measured1": ("#c27400", "#f0a030"),
    "measured2": ("#0a8f63", "#3ddc97"),
    "measured3": ("#1d3a52", "#cfd8e6"),
    "measured4": ("#6b4a10", "#b08d57"),
    "measured5": ("#0f7f9e", "#8ff0ff"),
    "measured6": ("#5f7a00", "#c3dc4a"),
    "measured7": ("#9c4f2e", "#e8a184"),
    "measured8": ("#5566a8", "#a9b8f0"),
    "predicted0": ("#6646fd", "#9b83ff"),
    "predicted1": ("#b8468a", "#f274b6"),
    "predicted2": ("#3c0a5e", "#e4d8f6"),
    "predicted3": ("#9f69ce", "#b56fd0"),
    "predicted4": ("#62022a", "#c9527e"),
    "predicted5": ("#3a2fb0", "#c6b0ff"),
    "predicted6": ("#8a1fa8", "#ffd0f8"),
    "predicted7": ("#7d6a8f", "#b9a6cc"),
    "predicted8": ("#1f0f3f", "#6f78ff"),
}
THEMES = ("light", "dark")
# No drawing has these for a reason of its own.
_STANDS_FOR = {f"#0a1b{i:02x}": role for i, role in enumerate(_COLOURS)}

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib, and is wider than what a browser takes
    "font.size": 9.0,
    "axes.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "axes.unicode_minus": False,
}


class Ink:
    """The colours of one drawing, and what its marks say when they are pointed at."""

    def __init__(self, theme: str | None = None) -> None:
        """``theme``: the ground, or None for colours that become variables."""
        self.colours = {
            role: stand_in if theme is None else _COLOURS[role][THEMES.index(theme)]
            for stand_in, role in _STANDS_FOR.items()
        }
        self.tips: dict[str, str] = {}

    def __getitem__(self, role: str) -> str:
        return self.colours[role]

    def of(self, op: str, kind: str) -> str:
        """An op's colour, by the kind of its rows."""
        place = OPS.index(op) if op in OPS else len(OPS) + sum(op.encode())
        return self[f"{kind}{place % 9}"]

    def tip(self, artist: Any, text: str) -> None:
        name = f"tip{len(self.tips)}"
        artist.set_gid(name)
        self.tips[name] = text


@dataclass(frozen=True)
class Picture:
    """A figure that rows can fill."""

    name: str  # of its file, without extension
    title: str  # says what it is, whether measured or predicted, and on which GPU
    source: str  # of its rows
    height: float  # in inches
    build: Callable[[Any, Ink], None]  # fills a matplotlib Figure
    width: float = 10.0
    headed: bool = True  # title and source are drawn, or only told to screen readers


def values(theme: str) -> str:
    """CSS declarations of the colours' variables on one ground."""
    place = THEMES.index(theme)
    return " ".join(f"--{role}: {pair[place]};" for role, pair in _COLOURS.items())


def variables() -> str:
    """CSS that gives the colours' variables their values, for either ground and for print."""
    return (
        f":root {{ {values('light')} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {values('dark')} }} }}"
    )


def svg(picture: Picture, alone: bool = True) -> str:
    """The drawing as text: a file's, or if it is not alone an element for a page.

    The page must have the ``variables``.
    """
    ink = Ink()
    drawn = _saved(picture, ink, format="svg", metadata=dict.fromkeys(_METADATA)).decode()
    head, body = drawn[drawn.index("<svg") :].split(">", 1)
    if "<metadata>" in body:
        raise RuntimeError("matplotlib wrote metadata that changes from day to day")
    body = re.sub(r"<style.*?</style>", "", body, flags=re.S)  # would hold for a whole page
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, body)
    body = re.sub(r"font-family: [^;\"]*|(?<=px) '[^;\"]*", lambda m: _fonts(m.group()), body)
    body = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{picture.name}-", body)
    body = body.replace("xlink:href", "href")
    for name, text in ink.tips.items():
        mark = f'<g id="{picture.name}-{name}">'
        body = body.replace(mark, f"{mark}\n<title>{html.escape(text)}</title>", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib writes one"
    title = html.escape(f"{picture.title}. {picture.source}")
    head = f'<svg {box.group()} stroke-linejoin="round" role="img" aria-label="{title}"'
    if not alone:
        return f"{head}>{body}"
    width, height = box.group()[:-1].split()[2:]
    head += f' width="{width}pt" height="{height}pt" xmlns="http://www.w3.org/2000/svg"'
    return f"{head}>\n<style>\n{variables()}\n</style>{body}"


_METADATA = ("Date", "Creator", "Format", "Type")


def _variable(match: re.Match[str]) -> str:
    """A role that matplotlib chose itself would be black on black."""
    return f"{match[1]}: var(--{_STANDS_FOR[match[2]]})"


def _fonts(said: str) -> str:
    return f"font-family: {_FONTS}" if said.startswith("font-family") else f" {_FONTS}"


def png(picture: Picture, theme: str = "light") -> bytes:
    return _saved(picture, Ink(theme), format="png", dpi=150, metadata={"Software": None})


def _saved(picture: Picture, ink: Ink, **options: Any) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure  # no window is ever opened, so no pyplot

    colours = {
        "figure.facecolor": ink["ground"],
        "axes.facecolor": ink["ground"],
        "axes.edgecolor": ink["soft"],
        "axes.labelcolor": ink["soft"],
        "xtick.color": ink["soft"],
        "ytick.color": ink["soft"],
        "text.color": ink["ink"],
        "grid.color": ink["line"],
    }
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own settings are
        settings: Any = _SETTINGS | colours | {"svg.hashsalt": picture.name}
        mpl.rcParams.update(settings)
        figure = Figure(figsize=(picture.width, picture.height), layout="constrained")
        if picture.headed:
            _head(figure, picture, ink)
        picture.build(figure, ink)
        out = io.BytesIO()
        figure.savefig(out, **options)
    return out.getvalue()


def _head(figure: Any, picture: Picture, ink: Ink) -> None:
    """Title and source, above all axes."""
    top = picture.height - 0.12
    for text, size, width, colour, weight in (
        (picture.title, 13, 90, "ink", "bold"), (picture.source, 8, 150, "soft", "normal")
    ):  # fmt: skip
        for line in (part for one in text.split("\n") for part in textwrap.wrap(one, width)):
            figure.text(
                0.012, top / picture.height, line,
                size=size, weight=weight, color=ink[colour], va="top",
            )  # fmt: skip
            top -= size * 1.55 / 72
    figure.get_layout_engine().set(rect=(0.005, 0.01, 0.99, (top - 0.08) / picture.height - 0.01))
