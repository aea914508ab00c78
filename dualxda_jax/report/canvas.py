"""A sheet to draw on in CSS pixels: images, text and lines on one Matplotlib axes.

One axes for everything is faster than one axes a picture. No pyplot, no rcParams: all that decides the look is given
here, so that a user's style sheet or backend changes nothing.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from dualxda_jax.report.extra import need

FOR, AGAINST, INK, MUTED, RULE = "#b3202c", "#1f5fa8", "#1c1c1e", "#6a6a70", "#c9c9cf"
"""Red speaks for a class, blue against it, in every figure and on the page."""

_STOPS = ((0.03, 0.19, 0.42), (0.15, 0.43, 0.72), (0.55, 0.75, 0.90), (1.0, 1.0, 1.0),
          (0.96, 0.68, 0.56), (0.78, 0.20, 0.20), (0.40, 0.00, 0.12))  # fmt: skip

_CSS_DPI, _DENSITY = 96, 2
"""Two device pixels a CSS pixel: sharp on dense screens and on paper."""


def symmetric_limit(*maps: Any) -> float:
    """The relevance that gets the full colour, so that the scale -limit..limit fits all the maps.

    It is the 99.5th percentile of the absolute relevance: a few pixels of a relevance map tower over the rest, which
    would be invisible if they set the scale.

    Args:
        maps: [h, w, c] each; summed over channels first.

    Returns:
        The limit, above 0; 1 if all maps are zero.
    """
    values = np.concatenate([np.abs(flat(m)).ravel() for m in maps]) if maps else np.zeros(1)
    limit = float(np.percentile(values, 99.5))
    return limit if limit > 0.0 else float(values.max()) or 1.0


def flat(relevance: Any) -> np.ndarray:
    """[h, w] relevance summed over channels."""
    return np.asarray(relevance, np.float64).sum(axis=2)


def colours(relevance: np.ndarray, limit: float) -> np.ndarray:
    """[h, w, 3] uint8 colours of relevance [h, w]: blue at -limit, white at 0, red at limit."""
    place = (np.clip(relevance / limit, -1.0, 1.0) + 1.0) / 2.0 * (len(_STOPS) - 1)
    knots = np.arange(len(_STOPS))
    channels = [np.interp(place, knots, [stop[c] for stop in _STOPS]) for c in range(3)]
    return np.round(np.stack(channels, axis=-1) * 255.0).astype(np.uint8)


def pixels(image: Any) -> np.ndarray:
    """[h, w, 3] uint8 pixels of an image [h, w, 1 or 3] in [0, 1]."""
    values = np.round(np.clip(np.asarray(image, np.float64), 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.broadcast_to(values, (*values.shape[:2], 3))


class Sheet:
    """A page of a figure; the origin is at the top left and lengths are CSS pixels."""

    def __init__(self, width: float, height: float):
        need("matplotlib")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = round(width), round(height)
        inches = (self.width / _CSS_DPI, self.height / _CSS_DPI)
        figure = Figure(figsize=inches, dpi=_CSS_DPI * _DENSITY, facecolor="white")
        figure.set_layout_engine("none")
        self._canvas = FigureCanvasAgg(figure)
        self._axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self._axes.set_axis_off()
        self._axes.set(xlim=(0, self.width), ylim=(self.height, 0), autoscale_on=False)

    def picture(
        self, rgb: np.ndarray, x: float, y: float, size: float, *, frame: str = RULE, line: float = 0.6
    ) -> None:
        """Draw [h, w, 3] uint8 into the square at (x, y), its shape kept, with a frame around it."""
        from matplotlib.patches import Rectangle

        h, w = rgb.shape[:2]
        width, height = size * w / max(h, w), size * h / max(h, w)
        left, top = x + (size - width) / 2, y + (size - height) / 2
        self._axes.imshow(
            rgb, extent=(left, left + width, top + height, top), aspect="auto", interpolation="nearest", origin="upper",
            resample=False,
        )  # fmt: skip
        box = Rectangle((left, top), width, height, fill=False, edgecolor=frame, linewidth=line * 0.75)
        self._axes.add_patch(box)

    def bar(self, x: float, y: float, width: float, height: float) -> None:
        """Draw the colour scale from -limit to limit."""
        ramp = colours(np.linspace(-1.0, 1.0, 256)[None, :], 1.0)
        self._axes.imshow(ramp, extent=(x, x + width, y + height, y), aspect="auto", interpolation="nearest")

    def rule(self, x: float, y: float, width: float, *, colour: str = RULE, line: float = 1.0) -> None:
        """Draw a horizontal line."""
        self._axes.plot(
            [x, x + width], [y, y], color=colour, linewidth=line * 0.75, linestyle="-", marker="None",
            solid_capstyle="butt",
        )  # fmt: skip

    def text(
        self, x: float, y: float, words: str, *, size: float = 12.0, colour: str = INK, bold: bool = False,
        align: str = "left", width: float | None = None, rotation: float = 0.0, middle: bool = False,
    ) -> None:  # fmt: skip
        """Write one or more lines; what is wider than `width` ends in an ellipsis.

        Args:
            x: of the edge or centre that `align` names.
            y: of the baseline, or of the centre with `middle`.
            words: plain text; "$" has no meaning.
            size: in CSS pixels.
            colour: of the text.
            bold: heavier.
            align: "left", "center" or "right".
            width: limit in CSS pixels.
            rotation: in degrees.
            middle: centre the text at y.
        """
        item = self._axes.text(
            x, y, words, fontsize=size * 0.75, color=colour, fontweight="bold" if bold else "normal",
            fontfamily="DejaVu Sans", fontstyle="normal", ha=align, va="center" if middle else "baseline",
            rotation=rotation, linespacing=1.25, parse_math=False, usetex=False,
        )  # fmt: skip
        # Measuring a text costs as much as drawing it: done only where the widest letters, an em each, might not fit.
        if width is not None and len(words) * size > width:
            self._shorten(item, words, width)

    def png(self) -> bytes:
        """The sheet as a PNG: the same bytes for the same drawing."""
        data = io.BytesIO()
        with _quiet():
            self._canvas.print_png(data, metadata={"Software": None})
        return data.getvalue()

    def _shorten(self, item: Any, words: str, width: float) -> None:
        renderer = self._canvas.get_renderer()
        with _quiet():
            while len(words) > 1 and item.get_window_extent(renderer).width / _DENSITY > width:
                words = words[:-1].rstrip()
                item.set_text(words + "…")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Class names may be in a script that the figures' font lacks: boxes there, and right on the page."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield
