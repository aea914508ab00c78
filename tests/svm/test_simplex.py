"""The projection onto the simplex, against optax and by its own laws."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualxda_jax.svm import simplex

project = jax.jit(simplex.project, static_argnames="axis")
points = arrays.arrays(np.float32, (6, 5), elements=st.floats(-1e3, 1e3, width=32))
few = hypothesis.settings(max_examples=100, deadline=None)


@pytest.mark.parametrize("k", [2, 5, 1000])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equals_optax(rng, k, scale):
    v = jnp.asarray(rng.normal(size=(7, k)) * scale, jnp.float32)
    # optax loses what a large common part hides; subtracting it first changes no projection.
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.vmap(optax.projections.projection_simplex)(v - v.max(axis=1, keepdims=True))
    np.testing.assert_allclose(project(v), expected, atol=2e-6)
    np.testing.assert_allclose(project(v.T, axis=0), expected.T, atol=2e-6)


@few
@hypothesis.given(points)
def test_feasible_idempotent_and_in_order(v):
    q = np.asarray(project(v))
    assert (q >= 0).all()
    np.testing.assert_allclose(q.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(project(q), q, atol=1e-6)
    order = np.argsort(v, axis=1)
    assert (np.diff(np.take_along_axis(q, order, 1), axis=1) >= -1e-7).all()


@few
@hypothesis.given(points, points)
def test_shortens_no_angle(v, inside):
    # ⟨v − q, p − q⟩ ≤ 0 for every p of the simplex: what makes q the nearest point.
    q, p = np.asarray(project(v), np.float64), np.asarray(project(inside), np.float64)
    assert (np.sum((v - q) * (p - q), axis=1) <= 1e-3 * (1 + np.abs(v).max())).all()


def test_far_ahead_is_an_exact_vertex():
    q = np.asarray(project(jnp.asarray([[5.0, 4.0, -1.0], [1e8, 0.0, 0.0], [0.25, 0.25, 0.25]], jnp.float32)))
    np.testing.assert_array_equal(q[:2], [[1, 0, 0], [1, 0, 0]])
    np.testing.assert_allclose(q[2], 1 / 3, rtol=1e-6)
