import base64
import dataclasses
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from dualxda_jax import report as room
from dualxda_jax.report import Pair, Query, Report, Stage, Suspect

NAMES = ("plain", "<b>bold</b> & $x_1$", "a class with a name that is far too long for a small picture")


def pair(rng, label, score, shape=(8, 8, 1), index=3):
    image = rng.random(shape)
    return Pair(index, label, score, image, rng.normal(size=shape), rng.normal(size=shape))


def query(rng, label=0, target=0, proponents=2, opponents=1, shape=(8, 8, 1), index=7):
    return Query(
        index, rng.random(shape), label, target, 1.25, rng.normal(size=shape),
        tuple(pair(rng, target, 0.5 / (i + 1), shape, 100 + i) for i in range(proponents)),
        tuple(pair(rng, 1 - target, -0.2 / (i + 1), shape, 200 + i) for i in range(opponents)),
    )  # fmt: skip


def full(rng):
    return Report(
        "Title <1> & more", "a data set", NAMES,
        (Stage("train", 40.25, "computed"), Stage("fit <svm>", 1.5, "reused")),
        (("gap", "3e-5", "relative & certified"),),
        (query(rng), query(rng, label=2, target=1, index=8)),
        (Suspect(11, rng.random((8, 8, 1)), 1, 0, 0.75), Suspect(12, rng.random((8, 8, 1)), 2, 2, 0.5)),
        ("jax <0.8>", "cpu"),
    )  # fmt: skip


class Page(HTMLParser):
    """The page as a browser takes it in: pictures, links, visible text."""

    def __init__(self, path):
        super().__init__()
        self.images, self.tags, self.words, self.ids, self.links = [], [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if "id" in attributes:
            assert attributes["id"] not in self.ids
            self.ids.add(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_data(self, data):
        self.words.append(data)


def png_size(data):
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data.rstrip()[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the full report, for the tests that only read it."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert room.write(folder, full(np.random.default_rng(0))) == folder / "index.html"
    return folder


def test_page_shows_all_that_was_given(written):
    page = Page(written / "index.html")
    for words in (
        "Title <1> & more", "a data set", "fit <svm>", "40.2", "41.8", "reused", "relative & certified", "3e-5",
        "Predicted plain, true class plain", f"Predicted {NAMES[1]}, true class {NAMES[2]}", "✓ right", "✗ wrong",
        "Test image 7", "Test image 8", "+1.25", "+0.500", "\N{MINUS SIGN}0.200",
        "the network is right on 1 and wrong on 1",
        "jax <0.8>",
    ):  # fmt: skip
        assert words in page.text, words
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    assert "b" not in page.tags


def test_page_is_self_contained(written):
    path = written / "index.html"
    html = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
    for outside in ("http://", "https://", "url(", "@import", "<script", "<link"):
        assert outside not in html
    page = Page(path)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert all(len(image["alt"]) > 20 for image in page.images)


def test_pictures_beside_the_page_are_those_inside(written):
    page = Page(written / "index.html")
    files = {p.name: p.read_bytes() for p in written.glob("*.png")}
    assert set(files) == {"overview.png", "query-01.png", "query-02.png", "suspects.png"}
    inside = {}
    for image in page.images:
        data = base64.b64decode(image["src"].split(",", 1)[1])
        # Twice as many pixels as the page gives it room.
        assert png_size(data) == (2 * int(image["width"]), 2 * int(image["height"]))
        inside[data] = image
    assert set(inside) == set(files.values())
    assert "200" in inside[files["query-01.png"]]["alt"] and "(wrong)" in inside[files["query-02.png"]]["alt"]


def test_same_report_same_bytes_whatever_the_style(written, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    style = {
        "font.size": 30,
        "image.cmap": "jet",
        "savefig.bbox": "tight",
        "figure.autolayout": True,
        "axes.grid": True,
    }
    with matplotlib.rc_context(style):
        room.write(tmp_path, full(np.random.default_rng(0)))
    assert dict(matplotlib.rcParams) == before
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_second_report_leaves_no_old_figures(tmp_path, rng):
    room.write(tmp_path, full(rng))
    mine = tmp_path / "query-notes.png"
    mine.write_bytes(b"kept")
    room.write(tmp_path, dataclasses.replace(full(rng), queries=(query(rng),), suspects=()))
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "overview.png", "query-01.png", mine.name}


@pytest.mark.parametrize(
    "queries",
    [
        pytest.param(lambda rng: (query(rng, proponents=3, opponents=0), query(rng, proponents=1)), id="ragged"),
        pytest.param(lambda rng: (query(rng, proponents=0, opponents=0),), id="no pairs"),
        pytest.param(lambda rng: (query(rng, proponents=5, opponents=4, shape=(9, 6, 3)),), id="colour, not square"),
        pytest.param(lambda rng: tuple(query(rng, 1, 0) for _ in range(5)), id="all wrong"),
        pytest.param(lambda rng: (), id="no queries"),
    ],
)
def test_other_shapes_of_content(tmp_path, rng, queries):
    report = dataclasses.replace(full(rng), queries=queries(rng))
    page = Page(room.write(tmp_path, report))
    assert len(page.images) == (len(report.queries) + 2 if report.queries else 1)


def test_zero_maps_and_one_class(tmp_path, rng):
    blank = np.zeros((8, 8, 1))
    still = Pair(0, 0, 0.0, blank, blank, blank)
    one = Query(0, blank, 0, 0, 0.0, blank, (still,), ())
    page = Page(room.write(tmp_path, Report("One", "nothing", ("only",), queries=(one,))))
    assert "Predicted only, true class only" in page.text
    assert "Results" not in page.text and "Stages" not in page.text and "Environment" not in page.text


def test_names_in_any_script(tmp_path, rng):
    page = Page(room.write(tmp_path, dataclasses.replace(full(rng), class_names=("猫", "कुत्ता", "حصان"))))
    assert "Predicted 猫, true class 猫" in page.text


def test_jax_arrays_are_taken(tmp_path, rng):
    import jax.numpy as jnp

    plain = query(rng, proponents=0, opponents=0)
    moved = dataclasses.replace(plain, image=jnp.asarray(plain.image), heatmap=jnp.asarray(plain.heatmap))
    assert room.write(tmp_path, dataclasses.replace(full(rng), queries=(moved,))).is_file()


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("queries[0].image", lambda q: {"image": q.image * 255}),
        ("queries[0].image", lambda q: {"image": q.image[..., 0]}),
        ("queries[0].image", lambda q: {"image": np.full_like(q.image, np.nan)}),
        ("queries[0].heatmap", lambda q: {"heatmap": np.full_like(q.image, np.nan)}),
        ("queries[0].target", lambda q: {"target": 3}),
        ("queries[0].target", lambda q: {"target": 1.5}),
        ("queries[0].label", lambda q: {"label": None}),
        ("queries[0].label", lambda q: {"label": -1}),
        ("queries[0].surrogate_logit", lambda q: {"surrogate_logit": np.ones(2)}),
        (
            "queries[0].opponents[0].score",
            lambda q: {"opponents": (dataclasses.replace(q.opponents[0], score=np.ones(1)),)},
        ),
        ("queries[0].surrogate_logit", lambda q: {"surrogate_logit": float("inf")}),
        (
            "queries[0].proponents[1].train_map",
            lambda q: {
                "proponents": (q.proponents[0], dataclasses.replace(q.proponents[1], train_map=np.zeros((4, 8, 1))))
            },
        ),
    ],
)
def test_bad_content_is_named(tmp_path, rng, place, change):
    good = query(rng)
    bad = dataclasses.replace(good, **change(good))
    with pytest.raises(ValueError, match=re.escape(place) + ": got"):
        room.write(tmp_path / "out", dataclasses.replace(full(rng), queries=(bad,)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=re.escape(place.replace("queries[0]", "query")) + ": got"):
        room.query_figure(bad, full(rng).class_names)


@pytest.mark.parametrize("name", [7, None, "\ud800"])
def test_class_names_that_cannot_be_written_are_named(tmp_path, rng, name):
    names = (*full(rng).class_names[:1], name, *full(rng).class_names[2:])
    with pytest.raises(ValueError, match=re.escape("class_names[1]: got")):
        room.write(tmp_path / "out", dataclasses.replace(full(rng), class_names=names))
    with pytest.raises(ValueError, match=re.escape("class_names[1]: got")):
        room.query_figure(query(rng), names)


def test_a_figure_with_fewer_slots_than_pairs_is_refused(rng):
    with pytest.raises(ValueError, match="slots: got"):
        room.query_figure(query(rng, proponents=3), full(rng).class_names, slots=(2, 2))


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_missing_library_names_the_extra(tmp_path, rng, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape('pip install "dualxda-jax[report]"')) as error:
        room.write(tmp_path, full(rng))
    assert error.value.name == module


def test_import_of_the_room_loads_neither_library():
    import subprocess

    code = "import sys, dualxda_jax.report; sys.exit(any(m in sys.modules for m in ('matplotlib', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
