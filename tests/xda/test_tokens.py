"""Tokens: the relevance of a whole number is that of the row that it looks up."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import types, xda
from dualxda_jax.xda import composites


class Text(nn.Module):
    """Embedding and position, one gated block with a mask from the tokens themselves, mean over tokens."""

    embedded: bool = False

    @nn.compact
    def __call__(self, tokens, x=None):
        table = nn.Embed(7, 4, name="table")
        x = table(tokens) if x is None else x
        x = x + self.param("position", nn.initializers.normal(0.5), (5, 4))[None]
        x = x + nn.silu(nn.Dense(6, use_bias=False)(x)) @ jnp.ones((6, 4)) / 6
        mask = (tokens > 0).astype(x.dtype)[..., None]
        return (x * mask).sum(1) / mask.sum(1)


TOKENS = np.asarray([[1, 3, 3, 0, 0], [6, 2, 5, 4, 1]])


@pytest.fixture(scope="module")
def text():
    variables = Text().init(jax.random.key(0), TOKENS)
    return variables, variables["params"]["table"]["embedding"][TOKENS]


def apply(variables, tokens):
    return Text().apply(variables, tokens)


@pytest.mark.parametrize("name", ["attn_lrp", "epsilon_plus_flat"])
def test_a_tokens_relevance_is_its_rows(name, text):
    variables, rows = text
    composite = getattr(composites, name)()
    seed = apply(variables, TOKENS)
    found = xda.relevance(apply, variables, TOKENS, seed, composite=composite)
    expected = xda.relevance(lambda v, x: Text().apply(v, TOKENS, x), variables, rows, seed, composite=composite)
    np.testing.assert_allclose(found, expected.sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), seed.sum(1), rtol=1e-4)
    assert not np.any(found[0, 3:]), "masked tokens have no say"


def test_a_one_hot_product_is_a_look_up(text):
    variables, _ = text
    table = variables["params"]["table"]["embedding"]
    hot, taken = (
        xda.relevance(fn, table, TOKENS, jnp.ones((2, 4)), composite=composites.epsilon())
        for fn in (
            lambda table, t: jnp.tanh(jax.nn.one_hot(t, 7) @ table).sum(1),
            lambda table, t: jnp.tanh(table[t]).sum(1),
        )
    )
    np.testing.assert_allclose(hot, taken, rtol=1e-5, atol=1e-7)


def test_pairs_and_logits_of_tokens(text):
    variables, _ = text
    composite = composites.attn_lrp()
    pair = xda.explain_pair(apply, variables, TOKENS[0], TOKENS[1], -2.0, composite=composite)
    assert pair.test.shape == pair.train.shape == (5,)
    np.testing.assert_allclose([pair.test.sum(), pair.train.sum()], [pair.score] * 2, rtol=1e-4)
    mapped = jax.vmap(lambda a, b, c: xda.explain_pair(apply, variables, a, b, c, composite=composite))(
        TOKENS, TOKENS[::-1], jnp.asarray([-2.0, 1.0])
    )
    np.testing.assert_allclose(mapped.test[0], pair.test, rtol=1e-4, atol=1e-6)
    none = jnp.zeros(0, jnp.int32)
    weights = jnp.arange(12.0).reshape(3, 4)
    model = types.SupportModel(jnp.zeros((0, 3)), jnp.zeros((0, 4)), none, none, weights, jnp.zeros(3), 0.0, 0)
    heat = xda.explain_logit(apply, variables, model, TOKENS[0], 1, composite=composite)
    np.testing.assert_allclose(heat.sum(), apply(variables, TOKENS[:1])[0] @ weights[1], rtol=1e-4)


def test_the_reports_take_tokens(text):
    variables, _ = text
    shape = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    table = xda.explain_rules(apply, variables, shape, composite=composites.attn_lrp())
    assert [r.path for r in table.rows if r.path] == ["Dense_0/kernel"]
    report = xda.check_conservation(apply, variables, TOKENS, composite=composites.attn_lrp(zero_bias=False))
    np.testing.assert_allclose(report.seed, jnp.square(apply(variables, TOKENS)).sum(), rtol=1e-5)
    # The positions are a bias: to the skip connection, and to the dense layer that they are merged into.
    assert [r.operation for r in report.rows if abs(r.lost) > 1e-3] == ["add", "add + dot_general"]
    np.testing.assert_allclose(sum(r.lost for r in report.rows), report.seed - report.input, rtol=1e-3)


def test_numbers_that_nothing_is_looked_up_with_are_refused(text):
    variables, _ = text
    with pytest.raises(xda.NoRuleError, match=r"dtype int32.*table"):
        xda.relevance(
            lambda v, t: t.astype(jnp.float32), variables, TOKENS, jnp.ones((2, 5)), composite=composites.epsilon()
        )
    with pytest.raises(ValueError, match=r"x: got dtype int\d+.*xda\.relevance"):
        xda.lrp(lambda t: apply(variables, t), composite=composites.epsilon())(TOKENS)


ROUTES = {
    "sliced": lambda t: t[:, 1:4],
    "reversed": lambda t: t[:, ::-1],
    "every second": lambda t: t[:, ::2],
    "gathered": lambda t: t[:, jnp.asarray([4, 0, 0, -1])],
    "gathered by the tokens themselves": lambda t: jnp.take_along_axis(t, (t > 2).sum(1, keepdims=True) - 1, axis=1),
    "shifted behind a start token": lambda t: jnp.concatenate([jnp.full((2, 1), 6, t.dtype), t[:, :-1]], axis=1),
    "padded": lambda t: jnp.pad(t, ((0, 0), (1, 2))),
    "replaced where unknown": lambda t: jnp.where(t > 4, jnp.ones((), t.dtype), t),
    "in another order": lambda t: t.T.reshape(2, 5),
    "one row each": lambda t: jnp.stack([t[:, 0], t[:, 3]], axis=1),
}


@pytest.mark.parametrize("route", ROUTES)
def test_tokens_may_be_moved_before_they_are_looked_up(route, rng):
    """Against the same moves made on the rows: their gradient says where each row came from."""
    table = jnp.asarray(rng.standard_normal((7, 3)), jnp.float32)
    tokens = jnp.asarray(TOKENS)
    moved = ROUTES[route](tokens)
    seed = jnp.tanh(table[moved]).sum(2)
    composite = composites.epsilon()
    found = xda.relevance(lambda p, t: jnp.tanh(p[ROUTES[route](t)]).sum(2), table, tokens, seed, composite=composite)
    each = xda.relevance(lambda p, x: jnp.tanh(x).sum(2), table, table[moved], seed, composite=composite).sum(2)
    # Tokens that are all different, inside of the table's range, tell where they went.
    expected = np.zeros((2, 5), np.float32)
    marks = np.asarray(_followed(ROUTES[route], tokens))
    for place, value in zip(marks.ravel(), np.asarray(each).ravel(), strict=True):
        if place >= 0:
            expected.ravel()[place] += value
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def _followed(route, tokens):
    """The place that every token was moved from, by changing one token at a time; -1 where no token matters."""
    moved = np.asarray(route(tokens))
    places = np.full(moved.shape, -1)
    for place in range(tokens.size):
        # Another token that is on the same side of every comparison above, so that nothing else moves.
        old = int(tokens.ravel()[place])
        other = {0: 1, 1: 2, 2: 1, 3: 4, 4: 3, 5: 6, 6: 5}[old]
        changed = np.asarray(route(tokens.ravel().at[place].set(other).reshape(tokens.shape)))
        places[changed != moved] = place
    return places


def test_tokens_that_are_mixed_before_the_look_up_are_refused(rng):
    table = jnp.asarray(rng.standard_normal((50, 3)), jnp.float32)
    with pytest.raises(xda.NoRuleError, match="one by one"):
        xda.relevance(
            lambda p, t: p[t[:, 1:] * 7 + t[:, :-1]].sum(1),
            table,
            TOKENS,
            jnp.ones((2, 3)),
            composite=composites.epsilon(),
        )
