"""From images to a fitted surrogate: the stages that every command on it shares, and reuses."""

import functools
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from dualxda_jax import attribution, checkpoint, data, models, report
from dualxda_jax._version import __version__
from dualxda_jax.pipeline import stages, store
from dualxda_jax.pipeline.config import DemoConfig
from dualxda_jax.types import DualSolution, FeatureModel, Features, Params, SupportModel

_MODULES = {"small-cnn": models.SmallCNN, "resnet-18": models.ResNet18}


class Surrogate(NamedTuple):
    """A data set, its network and the SVM on its features.

    Attributes:
        dataset: images and labels.
        model: the network's functions.
        params: its parameters.
        train: features of the training images.
        test: features of the test images.
        solution: of the SVM.
        support: its support vectors.
        stage: runs a further stage, kept beside these; see `store.stage`.
        log: the stages so far.
    """

    dataset: data.Dataset
    model: FeatureModel
    params: Params
    train: Features
    test: Features
    solution: DualSolution
    support: SupportModel
    stage: Callable[..., Any]
    log: list[report.Stage]


def surrogate(
    config: DemoConfig, *, track: store.Track | None = None, check: Callable[[data.Dataset], None] | None = None
) -> Surrogate:
    """Read, train, extract and fit, taking from `config.out`, which the caller has claimed, what fits.

    Args:
        config: what to compute.
        track: shows the progress of a stage; None shows nothing.
        check: called with the data set before any work on it, to raise what is wrong for a command.

    Raises:
        ValueError: data that cannot be read.
    """
    log: list[report.Stage] = []
    kept = config.out / "stages"
    stage = functools.partial(store.stage, kept, track or store.silent, log)

    dataset = stage("read images", lambda progress: stages.read(config))
    if check is not None:
        check(dataset)
    num_classes = len(dataset.class_names)
    module = _MODULES[config.network](num_classes=num_classes)
    settings = models.training.config_for(len(dataset.train.labels))
    made_by = checkpoint.fingerprint(__version__, dataset.train, config.network, config.seed, settings)
    unfinished = kept / f"training-{made_by[:12]}"
    params = stage(
        "train network", lambda p: stages.train(config, module, dataset.train, settings, unfinished, p), made_by
    )
    # Only now that the result is kept: it may not be, as on a full disk.
    shutil.rmtree(unfinished, ignore_errors=True)
    model = models.from_linen(module, head=models.HEAD)

    made_by = checkpoint.fingerprint(__version__, params, dataset.train, dataset.test)
    extract = functools.partial(stages.extract, model, params)
    train = stage("extract training features", lambda p: extract(dataset.train, p), made_by)
    test = stage("extract test features", lambda p: extract(dataset.test, p), made_by)

    made_by = checkpoint.fingerprint(__version__, train, num_classes, config.cost, stages.SOLVER)
    solution = stage("fit dual SVM", lambda p: stages.fit(train, num_classes, config.cost, p), made_by)
    support = attribution.compress(train.values, train.labels, solution)
    return Surrogate(dataset, model, params, train, test, solution, support, stage, log)
