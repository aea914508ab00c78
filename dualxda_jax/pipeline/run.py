"""The chain of stages of the demo, from a surrogate to a report."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from dualxda_jax import checkpoint, report
from dualxda_jax._version import __version__
from dualxda_jax.pipeline import content, stages, store
from dualxda_jax.pipeline.config import DemoConfig
from dualxda_jax.pipeline.surrogate import surrogate

TITLE = "Which training samples made it so"


def run(config: DemoConfig, *, track: store.Track | None = None) -> Path:
    """Go from images to a report.

    Args:
        config: what to compute.
        track: shows the progress of a stage; None shows nothing.

    Returns:
        Path of the report's HTML page.

    Raises:
        ValueError: data that cannot be read or drawn, another run at work in the folder.
        OSError: the folder of the report cannot be made.
    """
    # Better now than after the training.
    report.need_libraries()
    with store.claimed(config.out):
        return _run(config, track)


def _run(config: DemoConfig, track: store.Track | None) -> Path:
    made = surrogate(config, track=track, check=stages.check_drawable)
    dataset, model, params, train, test = made.dataset, made.model, made.params, made.train, made.test
    solution, support, stage, log = made.solution, made.support, made.stage, made.log

    choices = (config.right, config.wrong, config.each_way, config.seed, config.evaluated)
    made_by = checkpoint.fingerprint(__version__, params, support, test, choices)
    found = stage("attribute predictions", lambda p: stages.find(model, params, support, test, config), made_by)
    evaluate = functools.partial(stages.evaluate, model, params, train, test, solution, support)
    values = stage("evaluate surrogate", lambda p: evaluate(limit=config.evaluated, progress=p), made_by)
    made_by = checkpoint.fingerprint(made_by, stages.COMPOSITE, dataset.test, found)
    maps = stage("propagate relevance", lambda p: stages.explain(model, params, support, dataset, found, p), made_by)

    predicted = stages.network_logits(model, params, train.values[np.asarray(found["suspects"])]).argmax(axis=1)
    page = report.Report(
        title=TITLE,
        dataset=dataset.name,
        class_names=dataset.class_names,
        facts=content.facts(values, solution, maps["pairs"], config, min(config.evaluated, len(test.labels))),
        queries=content.queries(dataset, found, maps),
        suspects=content.suspects(dataset, found, predicted),
        environment=content.environment(config),
    )  # fmt: skip
    content.write_summary(config.out / "summary.json", values, solution, maps["pairs"], config, dataset.name, log)
    return stage(
        "write report", lambda progress: report.write(config.out, dataclasses.replace(page, stages=tuple(log)))
    )
