import io

import numpy as np
import pytest

from dualxda_jax.report import Pair, Query, charts, figures
from dualxda_jax.report.canvas import Sheet, colours, flat, pixels, symmetric_limit

NAMES = ("zero", "one")


def test_scale_is_symmetric_and_white_at_zero():
    values = np.linspace(-2.0, 2.0, 41)[None, :]
    drawn = colours(values, 2.0).astype(int)[0]
    assert (drawn[20] == 255).all()
    red, blue = drawn[..., 0], drawn[..., 2]
    assert (red[21:] > blue[21:]).all() and (blue[:20] > red[:20]).all()
    # Darker the farther from 0, on both sides.
    lightness = drawn.sum(axis=1)
    assert (np.diff(lightness[20:]) < 0).all() and (np.diff(lightness[:21]) > 0).all()


def test_values_beyond_the_limit_get_the_full_colour():
    drawn = colours(np.array([[-9.0, -1.0, 1.0, 9.0]]), 1.0)
    np.testing.assert_array_equal(drawn[0, 0], drawn[0, 1])
    np.testing.assert_array_equal(drawn[0, 2], drawn[0, 3])


def test_limit_ignores_sign_and_order(rng):
    a, b = rng.normal(size=(9, 9, 3)), rng.normal(size=(9, 9, 3))
    limit = symmetric_limit(a, b)
    assert limit == symmetric_limit(-b, a) == pytest.approx(3 * symmetric_limit(a / 3, b / 3))
    both = np.abs(np.concatenate([a.sum(axis=2), b.sum(axis=2)]))
    assert np.mean(both > limit) <= 0.01 and limit <= both.max()


def test_limit_of_little_or_nothing():
    assert symmetric_limit() == 1.0
    assert symmetric_limit(np.zeros((3, 3, 1))) == 1.0
    lone = np.zeros((100, 100, 1))
    lone[0, 0] = -0.25
    assert symmetric_limit(lone) == 0.25


def test_channels_are_added_and_grey_is_repeated(rng):
    relevance = rng.normal(size=(4, 5, 3))
    np.testing.assert_allclose(flat(relevance), relevance[..., 0] + relevance[..., 1] + relevance[..., 2])
    assert pixels(np.full((2, 3, 1), 0.2)).tolist() == np.full((2, 3, 3), 51).tolist()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "+0.00"),
        (0.014, "+0.0140"),
        (-0.00021, "\N{MINUS SIGN}2.1e\N{MINUS SIGN}4"),
        (12.345, "+12.3"),
        (123.4, "+123"),
        (9e-9, "+9.0e\N{MINUS SIGN}9"),
    ],
)
def test_numbers(value, words):
    assert figures.number(value) == words


def test_magnitudes():
    assert [figures.magnitude(v) for v in (0.022, 0.00021, 1.0, 12.0)] == ["0.022", "2.1e\N{MINUS SIGN}4", "1.0", "12"]


def decode(png):
    from matplotlib.image import imread

    return np.round(imread(io.BytesIO(png))[..., :3] * 255).astype(int)


def test_sheet_puts_pictures_where_it_says():
    sheet = Sheet(60, 40)
    sheet.picture(np.full((4, 4, 3), (200, 10, 30), np.uint8), 10, 5, 20)
    drawn = decode(sheet.png())
    assert drawn.shape == (80, 120, 3)
    assert (drawn[30, 40] == (200, 10, 30)).all()
    inside = (drawn == (200, 10, 30)).all(axis=2)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    assert abs(rows[0] - 10) <= 2 and abs(rows[-1] - 49) <= 2
    assert abs(columns[0] - 20) <= 2 and abs(columns[-1] - 59) <= 2


def test_sheet_shortens_what_is_too_wide():
    sheet = Sheet(400, 20)
    sheet.text(5, 15, "a name that goes on and on and on and on", width=80)
    ink = np.flatnonzero((decode(sheet.png()) < 128).any(axis=(0, 2)))
    assert 2 * 40 < ink[-1] <= 2 * (5 + 80)


def test_all_pairs_of_a_query_share_one_scale(rng):
    image, ones = np.zeros((8, 8, 1)), np.ones((8, 8, 1))
    strong, weak = (Pair(i, 0, s, image, m, m) for i, (s, m) in enumerate([(1.0, ones), (-0.5, -ones / 2)]))
    query = Query(0, image, 0, 0, 9.0, 10 * ones, (strong,), (weak,))
    assert figures.scales(query) == (1.0, 10.0)
    drawn = decode(figures.query_figure(query, NAMES).png)
    for relevance in (1.0, -0.5):
        colour = colours(np.full((1, 1), relevance), 1.0)[0, 0]
        # Test map and training map of the pair, each 8 by 8 cells of 28 pixels less the frame.
        assert (drawn == colour).all(axis=2).sum() > 2 * 200 * 200


def test_figures_of_one_page_align(rng):
    image = np.zeros((8, 8, 1))
    one = Pair(0, 0, 1.0, image, image, image)
    few, many = (Query(0, image, 0, 0, 1.0, image, (one,) * n, ()) for n in (1, 3))
    widths = {figures.query_figure(q, NAMES, slots=(3, 1)).width for q in (few, many)}
    assert len(widths) == 1
    assert figures.query_figure(few, NAMES).width < widths.pop()


def test_names_cover_no_marker_and_each_other():
    # All close to each other, as in a run that is done in no time.
    points = [(0.01 * 1.12**i, 4.0 + 0.07 * (i % 4), f"method-{i}", "#000000") for i in range(12)]
    with charts._figure(760, 430) as (figure, _):
        axes = charts._axes(figure, (0.085, 0.135, 0.885, 0.83))
        axes.set(xscale="log", xlim=(0.004, 0.2), ylim=(4.7, 3.6))
        charts._label_points(axes, points)
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in axes.texts]
        markers = axes.transData.transform([(x, y) for x, y, _, _ in points])
    assert len(boxes) == 12 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*place) for box in boxes for place in markers)
