"""Drawing: a figure for a wide page and one for a phone, as SVG that takes its colours and fonts from the page.

Texts stay texts, colours are the page's CSS variables, and one unit is one CSS pixel.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDE, NARROW = 720, 320  # CSS pixels
INK, MUTED, RULE, PAPER, SHADE = "#010101", "#010102", "#010103", "#010104", "#010105"
SERIES = ("#010106", "#010107", "#010108", "#010109")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    SHADE: "shade",
    **{colour: f"series-{index}" for index, colour in enumerate(SERIES, 1)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "veiltune",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.pad": 8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}

Painter = Callable[[Axes, bool], None]
"""draws on axes; True for a phone"""


def draw(
    paint: Painter,
    *,
    key: str,
    wide: tuple[int, int],
    narrow: tuple[int, int],
    top: int = 30,
    right: int = 24,
    bottom: int = 52,
    wide_width: int = WIDE,
) -> tuple[Markup, Markup]:
    """Draws for both widths; `wide` and `narrow` are height and left margin, all in CSS pixels."""
    drawings = []
    for is_narrow, width, (height, left) in ((False, wide_width, wide), (True, NARROW, narrow)):
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the reader's fonts will have it
            figure = Figure(figsize=(width / 72, height / 72))
            box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
            paint(figure.add_axes(box), is_narrow)
            drawings.append(_svg(figure, prefix=f"{key}{'n' if is_narrow else 'w'}-"))
    return drawings[0], drawings[1]


def _svg(figure: Figure, *, prefix: str) -> Markup:
    """The figure as SVG for the inside of a page: no declarations, no global style, ids of its own, CSS colours.

    The result is trusted: matplotlib escapes the texts, and nothing else in it comes from outside.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawn[drawn.index("<svg") :], flags=re.S
    )
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', drawn)[:2])
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    start = f'<svg {size} aria-hidden="true" focusable="false">'  # the box around it speaks
    body = drawn[drawn.index(">") + 1 :]
    body = re.sub(r' id="(?!m[0-9a-f]{10}"|p[0-9a-f]{10}")[^"]*"', "", body)
    body = re.sub(r' id="', f' id="{prefix}', body)
    body = body.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    body = re.sub(r' style="[^"]*"', lambda style: _themed(style[0]), body)
    return Markup(start + re.sub(r"\s*\n\s*", "\n", body))


def _themed(style: str) -> str:
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var(--{variable})")
    return re.sub(r"font-family: [^;\"]*;? ?", "", style)
