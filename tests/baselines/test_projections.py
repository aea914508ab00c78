import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax.baselines import projections
from dualxda_jax.baselines.projections import Projection, project
from dualxda_jax.baselines.rows import Outer, dense, dot


@pytest.fixture(scope="module")
def rows():
    """24 gradients of two vectors, a matrix as outer products, and a convolution's kernel."""
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "bias": jax.random.normal(keys[0], (24, 7)),
        "scale": jax.random.normal(keys[1], (24, 3)),
        "kernel": Outer(jax.random.normal(keys[2], (24, 9)), jax.random.normal(keys[3], (24, 11))),
        "conv": jax.random.normal(keys[4], (24, 2, 2, 3, 4)),
    }


@pytest.mark.parametrize("kind", projections.KINDS)
def test_projections_keep_inner_products(rows, kind, monkeypatch):
    """Johnson-Lindenstrauss: unbiased, with errors that the docstring bounds; the parameters cut into small blocks."""
    monkeypatch.setattr(projections, "_BLOCK", 50 * 40)
    size = 40
    exact = np.asarray(dot(rows, rows))
    norms = np.sqrt(np.diag(exact))

    def errors(key):
        projected = project(key, Projection(size, kind), rows)
        return (projected @ projected.T - exact) / (norms[:, None] * norms[None, :])

    every = np.asarray(jax.jit(lambda keys: jax.lax.map(errors, keys))(jax.random.split(jax.random.key(1), 200)))
    bound = np.sqrt((8 if kind == "sjlt" else 2) / size)
    # Five standard errors of what 200 draws estimate.
    assert np.sqrt((every**2).mean(0)).max() < bound * (1 + 5 / np.sqrt(2 * 200))
    assert abs(every.mean(0)).max() < 5 * bound / np.sqrt(200)
    assert np.sqrt((every**2).mean()) > 0.3 / np.sqrt(size)


@pytest.mark.parametrize("kind", projections.KINDS)
def test_outer_products_are_projected_as_what_they_are(rows, kind):
    size = 33
    projection = Projection(size, kind)
    key = jax.random.key(2)
    project = jax.jit(projections.project, static_argnums=1)
    got = project(key, projection, rows)
    assert got.shape == (24, size) and got.dtype == jnp.float32
    scale = float(jnp.abs(got).max())
    np.testing.assert_allclose(got, project(key, projection, dense(rows)), rtol=1e-4, atol=1e-5 * scale)
    # Linear, and each sample for itself.
    both = jax.tree.map(lambda a: 2 * a[:1] - a[1:2], dense(rows))
    np.testing.assert_allclose(project(key, projection, both)[0], 2 * got[0] - got[1], rtol=1e-3, atol=1e-4 * scale)
    assert not np.allclose(project(jax.random.key(3), projection, rows), got)


def test_blocks_bound_what_is_held():
    """For 100,000 parameters and 64 dimensions no array of the compiled function has more than a block of entries."""
    rows = {"w": jax.ShapeDtypeStruct((2, 100_000), jnp.float32)}
    for kind in projections.KINDS:
        traced = jax.make_jaxpr(lambda r, kind=kind: project(jax.random.key(0), Projection(64, kind), r))(rows)
        assert _largest(traced.jaxpr) <= max(projections._BLOCK + 64 * 32, 2 * 2 * 100_000) < 100_000 * 64


def _largest(jaxpr):
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    inner = [p for e in jaxpr.eqns for p in e.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
    return max([0, *sizes, *(_largest(getattr(p, "jaxpr", p)) for p in inner)])


def test_bad_projections():
    with pytest.raises(ValueError, match="projection: got 0"):
        Projection(0)
    with pytest.raises(ValueError, match="projection_kind: got 'fft'"):
        Projection(3, "fft")
    with pytest.raises(ValueError, match="projection: got 12, must be at most 11"):
        projections.check_size(Projection(12), 11)
