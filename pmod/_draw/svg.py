"""What pictures are made of: an SVG that grows as things are put on it, and a text.

Letters outside of boxes have the colour of the page's own text, so that they can be read
in a light and in a dark theme. A box brings its letters and its background together.
Widths are counted in letters, of a font whose letters are all equally wide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape

from attrs import frozen

from pmod._mesh.picture import hue_of

# pixels: the height of the letters, and from one line of text to the next
FONT = 12
LINE = 18
# no monospaced font is wider
LETTER = 0.62 * FONT


@frozen(repr=False)
class Picture:
    """A picture for notebooks, and its text for terminals."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def letters(text: str) -> float:
    """Return the width of a text, in pixels."""
    return LETTER * len(text)


def colour(number: int, second: int = 0) -> str:
    """Return a background for dark letters: a hue by number, paler by `second`."""
    return f"hsl({hue_of(number):.0f}, 65%, {76 + 4 * (second % 4)}%)"


class Svg:
    """A picture of boxes and letters, as large as they reach."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._hatched: list[str] = []
        self._letters: list[str] = []
        self.width, self.height = 0.0, 0.0

    def reach(self, x: float, y: float) -> None:
        """Make the picture go at least as far as here."""
        self.width, self.height = max(self.width, x), max(self.height, y)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Write a line of letters around the height y, from, around or up to x."""
        left = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * letters(text)
        weight = ' font-weight="bold"' if bold else ""
        self._letters.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight} '
            f'fill="currentColor">{escape(text)}</text>'
        )
        self.reach(x - left + letters(text), y + LINE / 2)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        text: str = "",
        tip: str = "",
    ) -> None:
        """Draw a box with letters in its middle; the mouse finds the tip there.

        With fill "none" it is dashed, and its letters have the page's colour.
        """
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        ink, dashed = "#111", ""
        if fill == "none":
            ink, dashed = "currentColor", ' stroke-dasharray="3 3"'
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{fill}" stroke="#888"{dashed}>{inside}</rect>'
        )
        # letters must not catch the mouse, which is to find the tip of the box
        if text:
            self._letters.append(
                f'<text x="{x + width / 2:.1f}" y="{y + height / 2:.1f}" '
                f'text-anchor="middle" fill="{ink}" '
                f'pointer-events="none">{escape(text)}</text>'
            )
        self.reach(x + width + 1, y + height + 1)

    def hatch(self, x: float, y: float, width: float, height: float) -> None:
        """Hatch a part of what has been drawn; letters stay above it."""
        self._hatched.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        )

    def _hatching(self, boxes: str) -> tuple[str, str]:
        """Return the pattern, which goes before the boxes, and what it fills."""
        if not self._hatched:
            return "", ""
        # an id in an SVG counts for the whole page: two pictures there must not have
        # the same one by chance, and the same picture must come out the same
        content = boxes + "".join(self._hatched)
        name = "hatch-" + hashlib.sha1(content.encode()).hexdigest()[:10]
        pattern = (
            f'<defs><pattern id="{name}" width="6" height="6" '
            'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            '<path d="M0 0V6" stroke="#111" stroke-opacity="0.45" stroke-width="2"/>'
            "</pattern></defs>"
        )
        fill = f'fill="url(#{name})" pointer-events="none"/>'
        return pattern, "".join(begun + fill for begun in self._hatched)

    def html(self, title: str) -> str:
        """Return the picture under its title; nothing in it runs or loads a file."""
        boxes = "".join(self._parts)
        pattern, hatched = self._hatching(boxes)
        width, height = round(self.width + 4), round(self.height + 4)
        fonts = "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
        return (
            f'<div style="overflow-x: auto"><div>{escape(title)}</div>'
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{height}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}" font-size="{FONT}" '
            f'font-family="{fonts}" dominant-baseline="central">'
            f"{pattern}{boxes}{hatched}{''.join(self._letters)}</svg></div>"
        )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return columns of text, each as wide as its widest entry."""
    widths = [0] * max(map(len, rows))
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], len(cell))
    lines: list[str] = []
    for row in rows:
        padded = map(str.ljust, row, widths)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
