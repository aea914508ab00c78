"""The main job on a small part of the embedded sample: what it writes, what a second run reuses, what it recomputes."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from dualxda_jax import checkpoint, data, pipeline
from dualxda_jax.pipeline import content, stages
from dualxda_jax.types import PairRelevance

KEPT = [
    "train-network", "extract-training-features", "extract-test-features", "fit-dual-SVM", "attribute-predictions",
    "evaluate-surrogate", "propagate-relevance",
]  # fmt: skip


@pytest.fixture(autouse=True)
def defaults():
    """The demo runs in a user's session, with JAX's own defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return pipeline.DemoConfig(out=tmp_path_factory.mktemp("demo"), limit=400, right=3, wrong=2, each_way=2)


def notes(config):
    """Run and give what each kept stage said."""
    said = {}

    def track(name):
        inner = pipeline.store.silent(name)
        watch = inner.__enter__()
        said[name] = []

        class Recorder:
            def __enter__(self):
                return pipeline.Watch(watch.progress, said[name].append)

            def __exit__(self, *error):
                return False

        return Recorder()

    page = pipeline.run(config, track=track)
    assert page == config.out / "index.html"
    return {name.replace(" ", "-"): note for name, (note,) in said.items() if note}


@pytest.fixture(scope="module")
def first(config):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return notes(config)


def test_the_first_run_computes_every_stage(first):
    assert first == dict.fromkeys(KEPT, "computed")


def test_the_page_shows_right_and_wrong_predictions_and_every_figure(config, first):
    text = (config.out / "index.html").read_text()
    assert len(list(config.out.glob("query-*.png"))) == 5
    assert (config.out / "overview.png").stat().st_size > 10_000
    for fact in ("Test accuracy", "Class detection", "Support vectors", "Duality gap", "Conservation"):
        assert fact in text
    assert "certified" in text and "NOT CONVERGED" not in text
    assert not re.search(r"(src|href)=\"http", text)


def test_the_summary_says_the_same_to_programs(config, first):
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["train_size"] == 400 and summary["converged"] is True
    assert summary["values"]["gap"] <= 1e-4 and 0 <= summary["values"]["accuracy"] <= 1
    assert [stage["name"].replace(" ", "-") for stage in summary["stages"] if stage["note"]] == KEPT
    assert all(stage["seconds"] >= 0 for stage in summary["stages"])


def test_the_numbers_hold_together(config, first):
    kept = {name: checkpoint.load(config.out / "stages" / name) for name in KEPT}
    found, maps, values = (kept[n] for n in ("attribute-predictions", "propagate-relevance", "evaluate-surrogate"))
    scores = np.stack([found["proponents"].scores, found["opponents"].scores], axis=1)
    np.testing.assert_allclose(maps["pairs"].score, scores, rtol=1e-4)
    assert content.conservation(maps["pairs"]) < 1e-3
    assert values["completeness"] < 1e-5
    assert 0 < values["support"] <= 1 and values["agreement"] > 0.8
    assert bool(kept["fit-dual-SVM"].info.converged)
    labels, targets = data.embedded_sample().test.labels[found["queries"]], np.asarray(found["targets"])
    assert list(labels == targets) == [True] * 3 + [False] * 2


def test_a_second_run_reuses_every_stage(config, first):
    assert notes(config) == dict.fromkeys(KEPT, "reused")


def test_another_cost_keeps_network_and_features(config, first):
    said = notes(dataclasses.replace(config, cost=1e-2))
    assert [said[name] for name in KEPT[:3]] == ["reused"] * 3
    assert [said[name] for name in KEPT[3:]] == ["recomputed: inputs changed"] * 4


def test_a_damaged_stage_is_recomputed(config, first):
    notes(config)
    (config.out / "stages" / "fit-dual-SVM" / "manifest.json").write_text("{")
    said = notes(config)
    assert said["fit-dual-SVM"] == "recomputed: file damaged"
    assert said["train-network"] == "reused"


def test_fewer_training_images_than_places_are_enough(tmp_path):
    alone = pipeline.DemoConfig(out=tmp_path, limit=1)
    assert notes(alone)["evaluate-surrogate"] == "computed"
    values = json.loads((tmp_path / "summary.json").read_text())["values"]
    assert values["class_detection"] in (0.0, 1.0)
    assert "of the 1 top samples" in (tmp_path / "index.html").read_text()
    # Correlations over one prediction are not defined, and nan is no JSON.
    assert values["matthews"] is None and "NaN" not in (tmp_path / "summary.json").read_text()


def test_a_network_that_cannot_be_kept_is_not_trained_twice(tmp_path, monkeypatch):
    config = pipeline.DemoConfig(out=tmp_path, limit=30)
    save, steps = checkpoint.save, []

    def full(path, *arguments, **options):
        if path.name == "train-network":
            raise checkpoint.CheckpointError("no space")
        save(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(checkpoint.CheckpointError, match="no space"):
            pipeline.fit(config)
    monkeypatch.setattr(stages.models.training, "_donating_step", lambda *a: steps.append(a))
    pipeline.fit(config)
    assert not steps
    assert not list((tmp_path / "stages").glob("training-*"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((4, 8, 8, 1), 200.0), "data: got training images with values in 200..200, must be in 0..1"),
        (np.full((4, 8, 8, 4), 200, np.uint8), "data: got training images with 4 channels, must be 1 or 3"),
    ],
)
def test_images_that_cannot_be_explained_are_refused_before_any_work(images, message, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "train", lambda *a, **k: pytest.fail("trained"))
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=images, labels=[0, 1, 0, 1])
    config = pipeline.DemoConfig(data=tmp_path, out=tmp_path / "out")
    for command in (pipeline.run, lambda config: pipeline.explain(config, [0])):
        with pytest.raises(ValueError, match=re.escape(message)):
            command(config)
    assert not config.out.exists()


def test_queries_are_spread_over_the_classes():
    labels = np.repeat(np.arange(4), 25)
    predicted = labels.copy()
    predicted[[3, 30, 60]] = (labels[[3, 30, 60]] + 1) % 4
    chosen = stages.choose(predicted, labels, right=4, wrong=5, seed=0)
    assert sorted(labels[chosen[:4]]) == [0, 1, 2, 3]
    assert sorted(chosen[4:]) == [3, 30, 60]  # all there are
    np.testing.assert_array_equal(chosen, stages.choose(predicted, labels, right=4, wrong=5, seed=0))
    assert not len(stages.choose(predicted, labels, right=0, wrong=0, seed=0))


def test_conservation_is_the_largest_share_missing():
    score = np.array([2.0, -1.0, 0.0])
    test = np.zeros((3, 2, 2, 1))
    test[:, 0, 0, 0] = [2.0, -0.75, 0.1]
    train = np.zeros((3, 2, 2, 1))
    train[:, 1, 1, 0] = [1.9, -1.0, 0.0]
    assert content.conservation(PairRelevance(test, train, score)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": 0.0}, "^cost: got 0.0, must be a positive number"),
        ({"cost": float("nan")}, "^cost: got nan"),
        ({"limit": 0}, "^limit: got 0, must be at least 1"),
        ({"seed": -1}, "^seed: got -1"),
        ({"network": "vgg"}, "^network: got 'vgg', must be one of small-cnn, resnet-18"),
    ],
)
def test_options_out_of_range_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.DemoConfig(**options)
