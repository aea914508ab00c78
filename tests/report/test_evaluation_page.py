"""The page of an evaluation, from results that no run is needed for."""

import json
import re

import numpy as np
import pytest

from dualxda_jax import report
from dualxda_jax.pipeline import lineup, results
from dualxda_jax.report import charts
from dualxda_jax.report.evaluation import megabytes


def page(folder, table, **changed):
    """The text of a page with that table."""
    full = {
        **table, "dataset": "data", "sizes": {"noisy": {"training": 4, "queries": 2}}, "accuracy": {"noisy": [0.5]},
        "options": {"preset": "small", "seeds": 1, "network": "small-cnn", "training_images": 4, "test_images": 2,
                    "subsets": 3, "steps": 5, "batch": 2, "fractions": [0.5]},
        "seconds": 1.0, "reused": 0, "stages": [], "environment": ["here"],
        "definitions": dict.fromkeys(("prepare", "explain", "kept", "interval"), "so"), **changed,
    }  # fmt: skip
    text = report.write_evaluation(folder, full).read_text()
    return re.sub(r"\s+", " ", re.sub(r"base64,[^\"]*", "", text))


def test_a_metric_without_any_query_is_undefined_and_last():
    cell = {"cost": [], "remarks": [], "importance": np.zeros(0), "curve": np.zeros(0)}
    entries = lineup.lineup("small", ["dualda-1e-3", "similarity"])
    full = {"marked": {**cell, "values": {"shortcut": np.array([0.5, 0.7])}}}
    empty = {"marked": {**cell, "values": {}}}
    table = results.assemble(entries, ("shortcut",), [{"dualda-1e-3": empty, "similarity": full}], [])
    best, last = table["methods"]
    assert best["name"] == "similarity" and best["ranks"] == {"shortcut": 1.0}
    assert last["values"]["shortcut"]["mean"] is None and last["ranks"] == {"shortcut": 2.0}
    json.dumps(table, allow_nan=False)


def test_a_page_of_one_metric_and_no_costs_is_written(tmp_path):
    entries = lineup.lineup("small", ["random"])
    cell = {"cost": [], "remarks": ["it guesses"], "importance": np.zeros(0), "values": {}, "curve": np.zeros(3)}
    table = results.assemble(entries, ("mislabel",), [{"random": {"noisy": cell}}], [])
    text = page(tmp_path, table)
    assert "undefined" in text and "it guesses" in text and "What they cost" not in text


def test_the_page_says_what_a_mean_leaves_out_and_the_queries_of_each_seed(tmp_path):
    cell = {"cost": [], "remarks": [], "importance": np.zeros(0), "curve": np.zeros(0)}
    entries = lineup.lineup("small", ["dualda-1e-3"])
    seeds = [
        {"dualda-1e-3": {"part": {**cell, "values": {"lds": np.array([0.5, np.nan, 0.7])}}}},
        {"dualda-1e-3": {"part": {**cell, "values": {"lds": np.array([np.nan, np.nan])}}}},
    ]
    table = results.assemble(entries, ("lds",), seeds, [])
    sizes = {"part": {"training": 1234, "queries": 3, "queries_per_seed": [3, 2]}}
    text = page(tmp_path, table, sizes=sizes, accuracy={"part": [0.5, 0.25]})
    assert "LDS has no value for 3 of 5 queries, which its mean leaves out" in text
    assert ">1,234</td>" in text and ">3 / 2</td>" in text and "3 networks on random halves" in text
    same = {"part": {"training": 4, "queries": 3, "queries_per_seed": [3, 3]}}
    assert ">3</td>" in page(tmp_path, table, sizes=same, accuracy={"part": [0.5, 0.25]})


def test_a_path_of_costs_is_drawn_with_and_without_intervals():
    """A seed that an earlier version has kept comes without."""
    names = ("class", "weight_cosine", "logit_correlation", "matthews", "kendall_tau")
    bare = {name: np.array([0.5, np.nan, 0.7]) for name in ("cost", "support", "nonzero", "gap", *names)}
    ends = {f"{name}_{end}": np.full(3, 0.4) for name in names for end in ("low", "high")}
    bare["cost"] = np.array([0.1, 1.0, 10.0])
    drawn = []
    for seeds in ([{**bare, **ends}], [{**bare, **ends}, bare], [bare, {**bare, **ends}]):
        table = results.assemble((), (), [{}] * len(seeds), seeds)
        drawn.append((set(table["sparsity"]) > set(bare), charts.sparsity_figure(table).png))
    assert [full for full, _ in drawn] == [True, False, False]
    assert drawn[0][1] != drawn[1][1] == drawn[2][1]


@pytest.mark.parametrize("rows", [3, 30])
def test_all_names_of_a_legend_lie_within_the_figure(rows, monkeypatch):
    names = [f"method-{i}" for i in range(rows)]
    curve = {"fractions": [0.1, 0.5], "values": [0.2, 0.3]}
    found = {
        "methods": [{"name": name, "control": False, "method": "trak"} for name in names],
        "metrics": {"coreset": {"higher": False, "title": "Coreset selection"}},
        "curves": {name: [0.0, 0.5, 1.0] for name in names},
        "selection": {"coreset": dict.fromkeys(names, curve)},
    }
    boxes, legend = [], charts._legend

    def watched(figure, axes):
        legend(figure, axes)
        figure.canvas.draw()
        boxes.append((figure.legends[0].get_window_extent(), figure.bbox))

    monkeypatch.setattr(charts, "_legend", watched)
    drawn = [charts.curves_figure(found), charts.selection_figure(found)]
    assert (rows == 3) == ([figure.height for figure in drawn] == [430, 400])
    assert all(box.y0 >= 0 and box.x1 <= sheet.x1 for box, sheet in boxes)


def test_removing_a_page_takes_its_figures_and_nothing_else(tmp_path):
    entries = lineup.lineup("small", ["random"])
    cell = {"cost": [], "remarks": [], "importance": np.zeros(0), "values": {}, "curve": np.linspace(0, 1, 3)}
    page(tmp_path, results.assemble(entries, ("mislabel",), [{"random": {"noisy": cell}}], []))
    (tmp_path / "mine.png").write_text("kept")
    assert (tmp_path / "mislabelling.png").exists()
    report.remove_evaluation(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0.0"), (800, "< 0.001"), (12_000, "0.01"), (60_000, "0.1"), (1_234_567_000, "1,234.6")]
)
def test_megabytes(count, words):
    assert megabytes(count) == words


@pytest.mark.parametrize("given", [None, [], {}, {"metrics": {}}])
def test_what_is_no_result_is_named(tmp_path, given):
    with pytest.raises(ValueError, match="results: got"):
        report.write_evaluation(tmp_path / "out", given)
    assert not (tmp_path / "out").exists()
