"""The chain of stages."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from dualxda_jax import attribution, checkpoint, models, report
from dualxda_jax._version import __version__
from dualxda_jax.pipeline import content, stages, store
from dualxda_jax.pipeline.config import DemoConfig

_MODULES = {"small-cnn": models.SmallCNN, "resnet-18": models.ResNet18}
TITLE = "Which training samples made it so"


def run(config: DemoConfig, *, track: store.Track | None = None) -> Path:
    """Go from images to a report.

    Args:
        config: what to compute.
        track: shows the progress of a stage; None shows nothing.

    Returns:
        Path of the report's HTML page.

    Raises:
        ValueError: data that cannot be read.
        OSError: the folder of the report cannot be made.
    """
    # Better now than after the training.
    report.need_libraries()
    config.out.mkdir(parents=True, exist_ok=True)
    log: list[report.Stage] = []
    kept = config.out / "stages"
    stage = functools.partial(store.stage, kept, track or store.silent, log)

    dataset = stage("read images", lambda progress: stages.read(config))
    num_classes = len(dataset.class_names)
    module = _MODULES[config.network](num_classes=num_classes)
    settings = models.training.config_for(len(dataset.train.labels))
    made_by = checkpoint.fingerprint(__version__, dataset.train, config.network, config.seed, settings)
    unfinished = kept / f"training-{made_by[:12]}"
    params = stage(
        "train network", lambda p: stages.train(config, module, dataset.train, settings, unfinished, p), made_by
    )
    model = models.from_linen(module, head=models.HEAD)

    made_by = checkpoint.fingerprint(__version__, params, dataset.train, dataset.test)
    extract = functools.partial(stages.extract, model, params)
    train = stage("extract training features", lambda p: extract(dataset.train, p), made_by)
    test = stage("extract test features", lambda p: extract(dataset.test, p), made_by)

    made_by = checkpoint.fingerprint(__version__, train, num_classes, config.cost, stages.SOLVER)
    solution = stage("fit dual SVM", lambda p: stages.fit(train, num_classes, config.cost, p), made_by)
    support = attribution.compress(train.values, train.labels, solution)

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
