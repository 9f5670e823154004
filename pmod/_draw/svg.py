"""What pictures are made of: an SVG that grows with what is put on it, and its text for
terminals.

Letters outside of boxes have the colour of the page's own text, so that a light and a
dark theme both show them; boxes bring letters and background together. All widths are
counted in letters, of a font whose letters are equally wide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape

from attrs import frozen

FONT = 12  # pixels
LETTER = 0.62 * FONT  # no monospaced font is wider
LINE = 18  # pixels from one line of text to the next


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
    """The width of a text, in pixels."""
    return LETTER * len(text)


def colour(number: int, second: int = 0) -> str:
    """A background for dark letters: hues that the golden angle spreads, paler and
    paler along `second`.
    """
    hue = (210 + 137.508 * number) % 360
    return f"hsl({hue:.0f}, 65%, {76 + 4 * (second % 4)}%)"


class Svg:
    """Boxes and letters, and how far they reach."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._hatched: list[str] = []
        self._letters: list[str] = []
        self.width, self.height = 0.0, 0.0

    def reach(self, x: float, y: float) -> None:
        """What is drawn goes as far as here."""
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
        """A line of letters around the height y, from, around or up to x."""
        left = {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * letters(text)
        weight = ' font-weight="bold"' if bold else ""
        self._letters.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight} fill="currentColor">{escape(text)}</text>'
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
        """A box with dark letters in its middle, and what the mouse finds there."""
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        dashed = "" if fill != "none" else ' stroke-dasharray="3 3"'
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
            f'stroke="#888"{dashed}>{inside}</rect>'
        )
        if text:
            ink = "currentColor" if fill == "none" else "#111"
            self._letters.append(
                f'<text x="{x + width / 2:.1f}" y="{y + height / 2:.1f}" text-anchor="middle" fill="{ink}" '
                f'pointer-events="none">{escape(text)}</text>'
            )
        self.reach(x + width + 1, y + height + 1)

    def hatch(self, x: float, y: float, width: float, height: float) -> None:
        """Hatch a part of what has been drawn; letters stay above it."""
        self._hatched.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        )

    def html(self, title: str) -> str:
        """The picture under its title; nothing in it runs, and it asks for no other
        file.
        """
        body = "".join(self._parts)
        # names in an SVG are of the whole page: two pictures must not share one by
        # chance
        name = (
            "hatch-"
            + hashlib.sha1((body + "".join(self._hatched)).encode()).hexdigest()[:10]
        )
        if self._hatched:
            pattern = (
                f'<defs><pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse" '
                'patternTransform="rotate(45)"><path d="M0 0V6" stroke="#111" stroke-opacity="0.45" '
                'stroke-width="2"/></pattern></defs>'
            )
            hatched = "".join(
                f'{part}fill="url(#{name})" pointer-events="none"/>'
                for part in self._hatched
            )
            body = pattern + body + hatched
        width, height = round(self.width + 4), round(self.height + 4)
        return (
            f'<div style="overflow-x: auto"><div>{escape(title)}</div>'
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" font-size="{FONT}" '
            f'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" dominant-baseline="central">'
            f"{body}{''.join(self._letters)}</svg></div>"
        )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, each as wide as its widest entry."""
    widths = [
        max(len(row[i]) for row in rows if i < len(row))
        for i in range(max(map(len, rows)))
    ]
    lines = (
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
