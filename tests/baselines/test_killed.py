"""Fits whose process is killed: what was written is used, and the numbers are those of a fit in one go."""

import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import baselines
from dualxda_jax.baselines.influence import ekfac

BLOCK = 4  # samples between two parts of EK-FAC, instead of many thousands
METHODS = {
    "tracin": baselines.tracin(),
    "trak": baselines.trak(projection=5),
    "influence_ekfac": baselines.influence_ekfac(damping=0.1, chunk=4),
}


def network(params, x):
    return jnp.tanh(x @ params["dense"]) @ params["head"]


def problem():
    """A context with three checkpoints, and queries."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    checkpoints = tuple({"dense": draw(4, 5), "head": draw(5, 3)} for _ in range(3))
    x, labels = draw(12, 4), jnp.asarray(rng.integers(0, 3, 12), jnp.int32)
    context = baselines.context(network, checkpoints[-1], x, labels, num_classes=3, checkpoints=checkpoints)
    return context, x[:2], labels[:2]


def child(folder):
    """Fit all methods, each in a thread; say so when every one has written a part; never write the last one."""
    ekfac._BLOCK = BLOCK
    context, *_ = problem()
    started = [threading.Event() for _ in METHODS]

    def fit(method, event):
        def progress(done, count):
            event.set()
            if done == count - 1:
                threading.Event().wait()

        baselines.fit_resumable(method, jax.random.key(0), context, folder, progress=progress)

    for method, event in zip(METHODS.values(), started, strict=True):
        threading.Thread(target=fit, args=(method, event), daemon=True).start()
    for event in started:
        event.wait()
    print("started", flush=True)
    threading.Event().wait()


def test_a_killed_fit_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    code = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); import test_killed as t; t.child("
    command = [sys.executable, "-c", f"{code}{str(tmp_path)!r})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    monkeypatch.setattr(ekfac, "_BLOCK", BLOCK)
    context, queries, targets = problem()
    for name, method in METHODS.items():
        written = {p.parent.name for p in tmp_path.glob(f"{name}-*/manifest.json")}
        count = method.stages.count(context)
        assert f"{name}-0000" in written and len(written) < count
        before = {folder: (tmp_path / folder / "manifest.json").read_bytes() for folder in written}
        fitted = baselines.fit_resumable(method, jax.random.key(0), context, tmp_path)
        assert all((tmp_path / folder / "manifest.json").read_bytes() == text for folder, text in before.items())
        assert len(list(tmp_path.glob(f"{name}-*/manifest.json"))) == count
        plain = method.fit(jax.random.key(0), context)
        scores = [np.asarray(method.scores(fit, queries, targets)) for fit in (fitted, plain)]
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6, atol=1e-7 * np.abs(scores[1]).max())
