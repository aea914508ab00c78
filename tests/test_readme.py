"""README's example runs as printed, and its commands are the ones that CI runs."""

import re
from pathlib import Path

import jax
import numpy as np

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_library_examples_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, larger = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    # A user's session has JAX's own defaults, not this suite's strict ones.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(main, "README.md", "exec"), names)
        exec(compile(larger, "README.md", "exec"), names)
    assert bool(names["solution"].info.converged) and bool(names["streamed"].info.converged)
    assert names["phi"].values.nbytes > names["given"]["config"].device_bytes
    np.testing.assert_allclose(names["streamed"].info.dual, names["solution"].info.dual, rtol=2e-4)
    maps, top = names["maps"], names["top"]
    score = float(top.scores[0, 0])
    np.testing.assert_allclose(float(maps.score), score, rtol=1e-4)
    np.testing.assert_allclose([float(maps.test.sum()), float(maps.train.sum())], score, rtol=2e-3)


def test_the_two_commands_are_there():
    (commands,) = re.findall(r"```bash\n(pip install.*?)```", README, re.DOTALL)
    assert [line.split("&&")[1].strip() for line in commands.strip().splitlines()] == ["dualxda demo", "pytest"]


def test_its_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README, re.DOTALL)
    assert pictures
    for path in pictures:
        assert (Path(__file__).parents[1] / path).is_file(), path
