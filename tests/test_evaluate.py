"""The evaluation as a whole, on a tiny network: complete, resumable, refusing what is not its own."""

import dataclasses
import pathlib
import re
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from dualxda_jax import checkpoint, cli, data, evaluation, pipeline
from dualxda_jax.evaluation import retrain
from dualxda_jax.evaluation.benchmark import METRICS
from dualxda_jax.pipeline import cases, cells, lineup, results


class Tiny(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12, name="dense")(x[:, ::2, ::2].reshape((x.shape[0], -1))))
        return nn.Dense(self.num_classes, name="head")(x)


@pytest.fixture(scope="module")
def module():
    patch = pytest.MonkeyPatch()
    for room in (cases, cells):
        patch.setattr(room, "module_of", lambda network, num_classes: Tiny(num_classes))
    yield
    patch.undo()


SIZES = (("limit", 90), ("queries", 110), ("part", 90), ("subsets", 4), ("steps", 6), ("fractions", (0.3, 0.6)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return pipeline.EvaluateConfig(out=out, methods=("dualda-1e-3", "random", "similarity"), changed=SIZES)


@pytest.fixture(scope="module")
def first(config, module):
    seen = []
    page = pipeline.evaluate(config, overall=lambda done, total: seen.append((done, total)))
    return page, seen, pipeline.load_results(config.out / "results.json")


def test_every_method_has_every_metric_with_an_interval(config, first):
    _, seen, found = first
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1)), "each stage is announced"
    rows = {row["name"]: row for row in found["methods"]}
    assert set(rows) == {"dualda-1e-3", "random", "similarity"} and list(found["metrics"]) == list(METRICS)
    for row in rows.values():
        for name, cell in row["values"].items():
            if cell["mean"] is not None:
                assert cell["low"] <= cell["mean"] <= cell["high"], name
        assert row["cost"]["explain_seconds"] > 0 and row["cost"]["queries"] == 110
    assert rows["dualda-1e-3"]["values"]["class"]["mean"] > rows["random"]["values"]["class"]["mean"] + 0.3
    assert rows["random"]["average_rank"] is None and rows["random"]["ranks"] == {}
    assert {1.0, 2.0} == {rows[n]["ranks"]["lds"] for n in ("dualda-1e-3", "similarity")}
    assert found["sizes"]["part"] == {"training": 90, "queries": 110, "queries_per_seed": [110]}
    assert found["sizes"]["noisy"]["training"] == 90 and 0 <= found["accuracy"]["clean"][0] <= 1
    assert len(found["lds"]["random"]) == 110 and found["selection"]["pruning"]["random"]["fractions"] == [0.3, 0.6]
    path = found["sparsity"]
    for name in ("class", "weight_cosine", "logit_correlation", "matthews", "kendall_tau"):
        for low, mean, high in zip(path[f"{name}_low"], path[name], path[f"{name}_high"], strict=True):
            assert mean is None or low <= mean <= high, name
    support = path["support"]
    assert len(support) == len(cells.COSTS) and support[0] > support[-1] > 0


def test_values_are_those_of_the_metrics_alone(config, first):
    """The mean in the table is what the public function says of the whole score matrix."""
    case = cases.make("clean", data.embedded_sample(), config, 0)
    network = checkpoint.load(config.out / "stages/seed-0/seed-0-train-on-clean-data", fingerprint=case.made_by)
    trained = cases.put_together(case, network, config)
    method = lineup.lineup("small", ["dualda-1e-3"])[0].make()
    fitted = method.fit(jax.random.key(0), trained.context)
    scores = method.scores(fitted, jax.numpy.asarray(trained.queries), jax.numpy.asarray(trained.targets))
    expected = evaluation.class_detection(scores, case.train.labels, trained.targets, k=5)
    row = next(row for row in first[2]["methods"] if row["name"] == "dualda-1e-3")
    assert row["values"]["class"]["mean"] == pytest.approx(float(expected), abs=1e-5)


def test_the_page_shows_the_table_and_all_figures(config, first):
    page, _, found = first
    text = page.read_text()
    for row in found["methods"]:
        assert f">{row['name']}</th>" in text
    figures = len(list(config.out.glob("*.png")))  # runtime, selection, mislabelling, LDS, sparsity
    assert text.count("data:image/png;base64,") == 5 == figures
    words = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert "http" not in words and not re.search(r"\bnan\b", words)


def test_another_run_computes_nothing_again(config, first, monkeypatch):
    monkeypatch.setattr(retrain, "logits", lambda *a, **k: pytest.fail("retrained"))
    monkeypatch.setattr(cells, "explain", lambda *a, **k: pytest.fail("explained"))
    monkeypatch.setattr(cases, "train", lambda *a, **k: pytest.fail("trained"))
    pipeline.evaluate(config)
    again = pipeline.load_results(config.out / "results.json")
    assert again["methods"] == first[2]["methods"] and again["reused"] == len(again["stages"])


def test_an_interrupted_run_is_not_a_finished_one_and_goes_on(config, first, monkeypatch):
    more = dataclasses.replace(config, seeds=2, metrics=("lds", "mislabel"), methods=("dualda-1e-3", "random"))
    stop, explain = [], cells.explain

    def interrupted(*args, **kwargs):
        stop.append(1)
        if len(stop) == 2:
            raise KeyboardInterrupt
        return explain(*args, **kwargs)

    monkeypatch.setattr(cells, "explain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate(more)
    assert not (config.out / "results.json").exists() and not (config.out / "index.html").exists()
    assert not list(config.out.glob("*.png"))
    with pytest.raises(ValueError, match="finished evaluation"):
        pipeline.load_results(config.out / "results.json")
    stop[:] = [1, 1]
    pipeline.evaluate(more)
    found = pipeline.load_results(config.out / "results.json")
    cell = found["methods"][0]["values"]["lds"]
    assert len(cell["per_seed"]) == 2 and cell["spread"] == pytest.approx(
        np.std([s["mean"] for s in cell["per_seed"]], ddof=1), rel=1e-4
    )
    assert cell["mean"] == pytest.approx(np.mean([s["mean"] for s in cell["per_seed"]]), rel=1e-4)
    # Seed 0's mislabelling was there from the first run; its LDS is another cell, since coreset needs more of it.
    assert found["reused"] > 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "dualxda-evaluation-0"}', "of format 'dualxda-evaluation-0', must be of format"),
        ("[1]", "no JSON object"),
        ("{", "no JSON object"),
        (f'{{"format": "{results.FORMAT}", "finished": false}}', "did not finish"),
    ],
)
def test_results_of_another_version_are_refused_before_any_work(content, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "results.json").write_text(content)
    monkeypatch.setattr(cases, "train", lambda *a, **k: pytest.fail("trained"))
    assert cli.main(["evaluate", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert (tmp_path / "results.json").read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "shapley"], "methods: got 'shapley', must be among"),
        (["--metrics", "lds", "beauty"], "metrics: got 'beauty', must be among class, subclass"),
        (["--preset", "huge"], "--preset"),
        (["--seeds", "0"], "seeds: got 0"),
        (["--subsets", "1"], "subsets: got 1"),
        (["--queries", "0"], "queries: got 0"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    assert cli.main(["evaluate", "--out", str(tmp_path / "out"), *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("dualxda:") == 1 and "Traceback" not in said


def folder(path, classes, size):
    """A data set of a few images, as .npz."""
    for name, n in (("train", 24), ("test", 12)):
        images = np.full((n, size, size, 1), 40, np.uint8)
        np.savez(path / f"{name}.npz", images=images, labels=np.arange(n) % classes)
    return str(path)


@pytest.mark.parametrize(
    ("classes", "size", "arguments", "message"),
    [
        (2, 12, [], "data: got 2 classes, must be 4 or more for the metric 'subclass'"),
        (2, 12, ["--metrics", "class", "shortcut"], "data: got 2 classes, must be 3 or more for the metric 'shortcut'"),
        (1, 12, ["--metrics", "lds"], "got labels of one class, must be of two or more"),
        (4, 8, [], "images: got shape (1, 8, 8, 1), must be"),
        (4, 12, ["--limit", "1", "--metrics", "mislabel"], "got 1 training images, must be 2 or more for the metric"),
        (4, 12, ["--part", "3", "--preset", "paper"], "must be more for the metric 'pruning', which takes away 90%"),
        (None, 12, [], "no such folder"),
    ],
)
def test_data_that_a_metric_cannot_take_are_refused_before_any_work(
    classes, size, arguments, message, tmp_path, capsys, monkeypatch
):
    """And what an earlier run has left is still there."""
    monkeypatch.setattr(cases, "train", lambda *a, **k: pytest.fail("trained"))
    out = tmp_path / "out"
    out.mkdir()
    left = {"results.json": f'{{"format": "{results.FORMAT}", "finished": true}}', "index.html": "page", "lds.png": ""}
    for name, content in left.items():
        (out / name).write_text(content)
    images = folder(tmp_path, classes, size) if classes else str(tmp_path / "nothing")
    assert cli.main(["evaluate", "--out", str(out), "--data", images, *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert {name: (out / name).read_text() for name in left} == left


def test_images_that_the_mark_is_not_the_brightest_of_are_refused(tmp_path, capsys):
    for name in ("train", "test"):
        images = np.linspace(0, 255, 12 * 12 * 12).reshape(12, 12, 12, 1)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(12) % 4)
    asked = ["--metrics", "shortcut", "--methods", "similarity", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", "--data", str(tmp_path), *asked]) == 1
    assert "data: got training images with values in 0..255, must be in 0..1, or uint8" in capsys.readouterr().err


def test_a_folder_where_another_run_is_at_work_is_refused(tmp_path, capsys):
    with pipeline.store.claimed(tmp_path):
        for command in (["evaluate"], ["demo"], ["attribute", "--images", "0"]):
            assert cli.main([*command, "--out", str(tmp_path)]) == 1
            said = capsys.readouterr().err
            assert "another run is at work" in said and said.count("\n") == 1
    with pipeline.store.claimed(tmp_path):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from dualxda_jax import checkpoint, pipeline
from dualxda_jax.pipeline import cases, cells, evaluate
from test_evaluate import SIZES, Tiny
cases.module_of = cells.module_of = lambda network, num_classes: Tiny(num_classes)
count, save = [0], checkpoint.save
def killing(path, *args, **kwargs):
    count[0] += 1
    if count[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, *args, **kwargs)
checkpoint.save = killing
config = pipeline.EvaluateConfig(out=Path(sys.argv[1]), methods=("random",), metrics=("lds",), changed=SIZES)
pipeline.evaluate(config)
"""


def test_a_run_that_is_killed_is_not_finished_and_goes_on(module, tmp_path):
    """Killed before its third checkpoint: one that keeps a retrained network."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), "3"]
    killed = subprocess.run(command, check=False, capture_output=True, cwd=pathlib.Path(__file__).parent)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "index.html").exists()
    kept = len(list((tmp_path / "stages/seed-0/networks").iterdir()))
    assert 0 < kept < dict(SIZES)["subsets"]
    config = pipeline.EvaluateConfig(out=tmp_path, methods=("random",), metrics=("lds",), changed=SIZES)
    pipeline.evaluate(config)
    found = pipeline.load_results(tmp_path / "results.json")
    assert found["stages"][0]["note"] == "reused" and found["methods"][0]["values"]["lds"]["mean"] is not None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_fail_the_method_alone(config, first, monkeypatch, bad):
    make = lineup.Entry.make

    def some(entry):
        method = make(entry)
        return dataclasses.replace(method, scores=lambda f, x, t: method.scores(f, x, t).at[0, 0].set(bad))

    monkeypatch.setattr(lineup.Entry, "make", some)
    pipeline.evaluate(dataclasses.replace(config, methods=("gradcos",), metrics=("class",)))
    (row,) = pipeline.load_results(config.out / "results.json")["methods"]
    assert "NaN or Inf for query 0" in row["failed"]["class"]


def test_a_method_that_fails_is_last_and_the_others_go_on(config, first, monkeypatch):
    make = lineup.Entry.make

    def broken(*args):
        raise ValueError("params:\n got nothing")

    def some(entry):
        method = make(entry)
        return dataclasses.replace(method, fit=broken) if entry.name == "gradcos" else method

    monkeypatch.setattr(lineup.Entry, "make", some)
    two = dataclasses.replace(config, methods=("gradcos", "similarity"), metrics=("class", "mislabel"))
    seen = []
    page = pipeline.evaluate(two, overall=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    best, last = pipeline.load_results(config.out / "results.json")["methods"]
    assert best["name"] == "similarity" and last["ranks"] == {"class": 2.0, "mislabel": 2.0}
    assert last["failed"]["class"] == "gradcos on clean data: params: got nothing"
    assert "failed" in page.read_text() and "gradcos on noisy data: params: got nothing" in page.read_text()


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate", "INTERNAL: broken"])
def test_a_method_without_memory_fails_alone_and_no_other_error_of_the_device_does(config, first, monkeypatch, message):
    def full(*args):
        raise jax.errors.JaxRuntimeError(message)

    make = lineup.Entry.make
    monkeypatch.setattr(lineup.Entry, "make", lambda entry: dataclasses.replace(make(entry), fit=full))
    one = dataclasses.replace(config, methods=("gradcos",), metrics=("class",))
    if "RESOURCE" not in message:
        with pytest.raises(jax.errors.JaxRuntimeError):
            pipeline.evaluate(one)
        return
    pipeline.evaluate(one)
    (row,) = pipeline.load_results(config.out / "results.json")["methods"]
    assert row["failed"] == {"class": "gradcos on clean data: the device's memory is not enough"}


def test_retrained_networks_are_spread_over_accelerators(config, first, monkeypatch, tmp_path):
    """Eight fake CPUs that pass for something else, against what one has trained."""
    name = "seed-0-train-on-the-part-to-retrain-on"
    case = cases.make("part", data.embedded_sample(), config, 0)
    network = checkpoint.load(config.out / "stages/seed-0" / name, fingerprint=case.made_by)
    trained = cases.put_together(case, network, config)
    alone = cells.retrain_halves(trained, config, 0, config.out / "stages/seed-0/networks", lambda done, total: None)
    seen, logits = [], retrain.logits

    def watched(*args, sharding, **kwargs):
        seen.append(sharding)
        return logits(*args, sharding=sharding, **kwargs)

    monkeypatch.setattr(retrain, "logits", watched)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    spread = cells.retrain_halves(trained, config, 0, tmp_path, lambda done, total: None)
    assert seen[0].mesh.size == 8
    np.testing.assert_allclose(spread["outputs"], alone["outputs"], rtol=1e-3, atol=1e-4)


def test_every_registered_method_has_a_row():
    from dualxda_jax.baselines import METHODS

    for preset in lineup.PRESETS:
        assert {entry.method for entry in lineup.lineup(preset, list(METHODS))} == set(METHODS)
        names = [entry.name for entry in lineup.lineup(preset)]
        assert len(names) == len(set(names)) and {"dualda-1e-5", "dualda-1e-3", "dualda-1e-1", "random"} <= set(names)
    assert all(entry.make().name for entry in lineup.lineup("small", list(METHODS)))
