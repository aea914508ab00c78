"""The figures of a report, each from plain data to a PNG."""

from collections.abc import Sequence
from typing import NamedTuple

from dualxda_jax._check import fail
from dualxda_jax.report.canvas import AGAINST, FOR, INK, MUTED, Sheet, colours, flat, pixels, symmetric_limit
from dualxda_jax.report.content import Pair, Query, Suspect, check_names, check_query

_TILE = 112
"""A multiple of 28 and of 32 device pixels: the pixels of MNIST and CIFAR stay squares."""

_GAP, _MARGIN = 10, 6
_MINUS = "\N{MINUS SIGN}"


class Figure(NamedTuple):
    """A drawn figure: the PNG and its size in CSS pixels (the PNG has twice as many)."""

    png: bytes
    width: int
    height: int


def number(value: float) -> str:
    """A signed number with three significant digits (two if it is tiny) and a true minus sign: short, for captions."""
    return _short(value, "+", 3)


def magnitude(value: float) -> str:
    """A limit of a colour scale: two significant digits, no sign."""
    return _short(value, "", 2)


def scales(query: Query) -> tuple[float, float]:
    """The colour limits of a query: of all its pairs' maps together, and of the surrogate's own heat map."""
    pairs = (*query.proponents, *query.opponents)
    return symmetric_limit(*(m for p in pairs for m in (p.test_map, p.train_map))), symmetric_limit(query.heatmap)


def query_figure(query: Query, class_names: Sequence[str], *, slots: tuple[int, int] | None = None) -> Figure:
    """A test image, the surrogate's heat map, and the pairs with their two maps each.

    Args:
        query: what to show.
        class_names: one a class.
        slots: columns for proponents and opponents, so that the figures of one page align; None takes as
            many as there are.

    Raises:
        ValueError: an image, a map or a label that cannot be shown, as in a report; fewer slots than pairs.
    """
    check_names(class_names)
    check_query("query", query, class_names)
    counts = (len(query.proponents), len(query.opponents))
    slots = slots or (max(counts[0], 1), max(counts[1], 1))
    if slots[0] < max(counts[0], 1) or slots[1] < max(counts[1], 1):
        fail("slots", slots, f"at least {max(counts[0], 1)} and {max(counts[1], 1)}, one a pair")
    rows = [64 + row * (_TILE + _GAP) for row in range(3)]
    left, first = 34, 34 + _TILE + 36
    second = first + _span(slots[0]) + 30
    sheet = Sheet(second + _span(slots[1]) + _MARGIN, rows[2] + _TILE + _MARGIN)
    limit, own_limit = scales(query)
    name = class_names[query.target]

    for y, words in zip(
        rows, ("image", "relevance in\nthe test image", "relevance in\nthe training image"), strict=True
    ):
        sheet.text(15, y + _TILE / 2, words, size=10.5, colour=MUTED, align="center", rotation=90, middle=True)

    sheet.text(left, 17, f"Test image {query.index}", bold=True, width=_TILE + 24)
    sheet.text(left, 38, f"predicted {name}", size=11.5, width=_TILE + 24)
    mark, colour = ("✓", MUTED) if query.right else ("✗", INK)
    sheet.text(left, 54, f"{mark} true {class_names[query.label]}", size=11.5, colour=colour, width=_TILE + 24)
    sheet.picture(pixels(query.image), left, rows[0], _TILE)
    sheet.picture(colours(flat(query.heatmap), own_limit), left, rows[1], _TILE)
    _legend(sheet, left, rows[2], limit, own_limit, bool(sum(counts)))

    groups = ((query.proponents, first, slots[0], "Proponents", "for", FOR),
              (query.opponents, second, slots[1], "Opponents", "against", AGAINST))  # fmt: skip
    for pairs, x, slot, title, side, colour in groups:
        words = f"{title}, speaking {side} {name}" if slot > 1 else title
        sheet.text(x, 17, words, bold=True, colour=colour, width=_span(slot))
        sheet.rule(x, 23, _span(slot), colour=colour, line=1.2)
        if not pairs:
            sheet.text(x, rows[0] + 16, "none", colour=MUTED)
        for place, pair in enumerate(pairs):
            _pair_column(sheet, pair, x + place * (_TILE + _GAP), rows, limit, class_names)
    return Figure(sheet.png(), sheet.width, sheet.height)


def overview_figure(queries: Sequence[Query], class_names: Sequence[str], *, proponents: int = 2) -> Figure:
    """A few queries, a row each: image, heat map, and the best pairs as (training image, test map, training map).

    Args:
        queries: those to show, in order.
        class_names: one a class.
        proponents: at most that many are shown, and one opponent.
    """
    tile, gap, block_gap, top, step = 84, 4, 22, 58, 84 + 30
    block = 3 * tile + 2 * gap
    starts = [_MARGIN + 2 * tile + gap + block_gap + i * (block + block_gap) for i in range(proponents + 1)]
    sheet = Sheet(starts[-1] + block + _MARGIN, top + max(len(queries), 1) * step + 2)
    _overview_heads(sheet, starts, tile, gap, block)
    for row, query in enumerate(queries):
        y = top + row * step
        limit, own_limit = scales(query)
        for i, rgb in enumerate((pixels(query.image), colours(flat(query.heatmap), own_limit))):
            sheet.picture(rgb, _MARGIN + i * (tile + gap), y, tile)
        name = class_names[query.target]
        words = f"✓ {name}" if query.right else f"✗ {name}, true {class_names[query.label]}"
        sheet.text(_MARGIN, y + tile + 15, words, size=11.5, bold=True, width=2 * tile + gap + block_gap - 8)
        shown = [*query.proponents[:proponents], *[None] * (proponents - len(query.proponents[:proponents]))]
        for x, pair in zip(starts, [*shown, next(iter(query.opponents), None)], strict=True):
            if pair is None:
                sheet.text(x, y + tile / 2, "none", size=11.5, colour=MUTED, middle=True)
                continue
            maps = (colours(flat(pair.test_map), limit), colours(flat(pair.train_map), limit))
            for i, rgb in enumerate((pixels(pair.image), *maps)):
                sheet.picture(rgb, x + i * (tile + gap), y, tile)
            sheet.text(x, y + tile + 15, class_names[pair.label], size=11.5, width=block - 76)
            colour = FOR if pair.score >= 0 else AGAINST
            sheet.text(x + block, y + tile + 15, number(pair.score), size=11.5, colour=colour, bold=True, align="right")
    return Figure(sheet.png(), sheet.width, sheet.height)


def suspects_figure(suspects: Sequence[Suspect], class_names: Sequence[str], *, columns: int = 8) -> Figure:
    """Training images with the label they carry, the class the network predicts, and their self-influence."""
    step = _TILE + 66
    rows = -(-len(suspects) // columns)
    sheet = Sheet(2 * _MARGIN + columns * (_TILE + _GAP) - _GAP, rows * step + _MARGIN)
    for i, suspect in enumerate(suspects):
        x, y = _MARGIN + (i % columns) * (_TILE + _GAP), _MARGIN + (i // columns) * step
        sheet.picture(pixels(suspect.image), x, y, _TILE)
        y += _TILE
        sheet.text(x, y + 16, class_names[suspect.label], size=11.5, bold=True, width=_TILE)
        agree = suspect.predicted == suspect.label
        words = "predicted the same" if agree else f"predicted {class_names[suspect.predicted]}"
        sheet.text(x, y + 31, words, size=10.5, colour=MUTED if agree else INK, width=_TILE)
        sheet.text(x, y + 46, number(suspect.self_influence).lstrip("+"), size=10.5)
        sheet.text(x + _TILE, y + 46, f"#{suspect.index}", size=10.5, colour=MUTED, align="right")
    return Figure(sheet.png(), sheet.width, sheet.height)


def _short(value: float, sign: str, digits: int) -> str:
    """Format a number; what %g would write as 0.000210 becomes 2.1e−4, which is shorter."""
    if 0.0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:{sign}.1e}".split("e")
        words = f"{mantissa}e{int(exponent)}"
    else:
        words = f"{value:{sign}#.{digits}g}".removesuffix(".")
    return words.replace("-", _MINUS)


def _span(slots: int) -> int:
    return slots * (_TILE + _GAP) - _GAP


def _pair_column(
    sheet: Sheet, pair: Pair, x: float, rows: Sequence[float], limit: float, class_names: Sequence[str]
) -> None:
    colour = FOR if pair.score >= 0 else AGAINST
    sheet.text(x, 40, class_names[pair.label], size=12, width=_TILE)
    sheet.text(x, 56, number(pair.score), size=11, colour=colour, bold=True)
    sheet.text(x + _TILE, 56, f"#{pair.index}", size=9.5, colour=MUTED, align="right")
    maps = (colours(flat(pair.test_map), limit), colours(flat(pair.train_map), limit))
    for y, rgb in zip(rows, (pixels(pair.image), *maps), strict=True):
        sheet.picture(rgb, x, y, _TILE)


def _legend(sheet: Sheet, x: float, y: float, limit: float, own_limit: float, pairs: bool) -> None:
    """The colour scale, in the one place of the grid that has no map."""
    sheet.text(x, y + 14, "↑ all training", size=10.5, colour=MUTED)
    sheet.text(x, y + 28, "samples together,", size=10.5, colour=MUTED)
    sheet.text(x, y + 42, f"own scale ±{magnitude(own_limit)}", size=10.5, colour=MUTED)
    if not pairs:
        return
    sheet.text(x, y + 68, "Scale of all pairs →", size=10.5, colour=INK)
    sheet.bar(x, y + 76, _TILE, 9)
    sheet.text(x, y + 99, _MINUS + magnitude(limit), size=10.5)
    sheet.text(x + _TILE, y + 99, "+" + magnitude(limit), size=10.5, align="right")


def _overview_heads(sheet: Sheet, starts: Sequence[float], tile: float, gap: float, block: float) -> None:
    titles: list[tuple[str, float, float, str, tuple[str, ...]]] = [
        ("Prediction", _MARGIN, 2 * tile + gap, INK, ("test image", "heat map"))
    ]
    names = [f"Proponent {i + 1}" for i in range(len(starts) - 1)] + ["Strongest opponent"]
    for name, x in zip(names, starts, strict=True):
        colour = AGAINST if name.endswith("opponent") else FOR
        titles.append((name, x, block, colour, ("training image", "test map", "training map")))
    for title, x, width, colour, columns in titles:
        sheet.text(x, 17, title, size=13, bold=True, colour=colour)
        sheet.rule(x, 24, width, colour=colour, line=1.2)
        for i, words in enumerate(columns):
            sheet.text(x + i * (tile + gap), 42, words, size=10.5, colour=MUTED, width=tile)
