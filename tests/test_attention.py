"""Attention beyond one sequence and itself: masks, memory, shared heads; and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from fnbp.layers import attending
from tests import oracles
from tests.cases import relative

rng = np.random.default_rng(0)


@pytest.fixture(params=["at once", "in blocks"], autouse=True)
def form(request, monkeypatch):
    """Every test here sees both forms of attention."""
    if request.param == "in blocks":
        monkeypatch.setattr(attending, "SHORT", 0)
        monkeypatch.setattr(attending, "BLOCK", 2)
        jax.clear_caches()


X, MEMORY = rng.standard_normal((3, 5, 12)), rng.standard_normal((3, 7, 11))
KEYS = np.array([[1, 1, 0, 1, 0, 1, 1], [0] * 7, [1] * 7], bool)  # the second example has nothing to look at


def drawn(layer, x):
    params, state = layer.init(jax.random.key(0), x)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) / 3), params), state


@pytest.mark.parametrize(("heads", "kv", "rotary"), [(6, 6, None), (6, 2, 100.0), (3, 1, None)])
def test_cross_attention_under_a_mask(x64, heads, kv, rotary):
    layer, x = fnbp.attention(heads, kv, rotary=rotary), (jnp.asarray(X), jnp.asarray(MEMORY))
    params, state = drawn(layer, x)
    ctx = fnbp.Context(mask=jnp.asarray(KEYS))
    y, _, res = layer.forward(params, state, x, ctx)
    plain = jax.tree.map(np.asarray, params)
    due = oracles.attention(plain, X, heads, kv, rotary=rotary, memory=MEMORY, mask=KEYS)
    assert relative(y, due) <= 1e-13
    dy = jnp.asarray(rng.standard_normal(y.shape))
    factors, dx = layer.backward(params, res, dy)
    grads = jax.tree.map(lambda f: f.total(), factors, is_leaf=lambda f: isinstance(f, fnbp.Factor))
    f = lambda params, x: layer.forward(params, state, x, ctx)[0]  # noqa: E731
    automatic, automatic_dx = jax.vjp(f, params, x)[1](dy)
    assert relative((grads, dx), (automatic, automatic_dx)) <= 1e-12
    assert not dx[0][1].any() and not dx[1][1].any() and (y[1] == params["b_O"]).all()


def test_attention_to_a_memory_that_is_the_sequence_itself_is_still_of_a_pair(x64):
    x = jnp.asarray(X)
    layer = fnbp.attention(3)
    params, state = drawn(layer, x)
    dy = jnp.asarray(rng.standard_normal(x.shape))
    _, alone = layer.backward(params, layer.forward(params, state, x, fnbp.Context())[2], dy)
    _, (dx, dz) = layer.backward(params, layer.forward(params, state, (x, x), fnbp.Context())[2], dy)
    assert relative(dx + dz, alone) <= 1e-14


def test_a_mask_for_each_query_is_a_causal_one_where_it_says_so(x64):
    x = jnp.asarray(X)
    params, state = drawn(fnbp.attention(3), x)
    triangle = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (3, 5, 5))
    masked = fnbp.attention(3).forward(params, state, x, fnbp.Context(mask=triangle))[0]
    assert relative(masked, fnbp.attention(3, causal=True).forward(params, state, x, fnbp.Context())[0]) <= 1e-15


@pytest.mark.parametrize("form", ["at once"], indirect=True)
def test_rotary_scores_know_distances_alone(x64, form):
    """Turned by their positions, q and k match as they would if both stood elsewhere."""
    layer = fnbp.attention(1, rotary=50.0, b=None)
    a, b = rng.standard_normal((2, 1, 2, 12))
    params, state = drawn(layer, jnp.asarray(a))
    p = [layer.forward(params, state, jnp.asarray(x), fnbp.Context())[2][5] for x in (
        np.concatenate([a, b], 1), np.concatenate([b, a], 1))]  # fmt: skip
    np.testing.assert_allclose(
        p[0][0, 0, 0, 0, 1] / p[0][0, 0, 0, 0, 0], p[1][0, 0, 2, 0, 3] / p[1][0, 0, 2, 0, 2], rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compare_takes_masked_rows_for_no_fault(dtype):
    x, ctx = X[..., :6].astype(dtype), fnbp.Context(mask=np.arange(5) < np.array([[3], [0], [5]]))
    report = fnbp.compare(fnbp.attention(3, 1, causal=True), x, ctx=ctx, transforms=("jit",))
    assert report.ok, str(report)


def test_per_example_norms_of_a_masked_example_are_its_own():
    layer = fnbp.attention(3)
    x, ctx = jnp.asarray(X, jnp.float32), fnbp.Context(mask=jnp.arange(5) < jnp.array([[3], [2], [5]]))
    params, state = layer.init(jax.random.key(0), x)
    norms = fnbp.per_example_norms(layer, fnbp.half_squared_error())(params, state, x, x, ctx)
    one = fnbp.value_and_grad(layer, fnbp.half_squared_error())
    for i, n in enumerate((3, 2, 5)):
        mask = fnbp.Context(mask=jnp.arange(5)[None] < n)
        grads = one(params, state, x[i : i + 1], x[i : i + 1], mask)[1]
        np.testing.assert_allclose(norms[i], jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))), rtol=1e-5)


@pytest.mark.parametrize("form", ["at once"], indirect=True)
@pytest.mark.parametrize("T, S", [(1, 67), (129, 67), (67, 300), (131, 131)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", ["one by one", "at once"])
def test_blocks_are_the_formula_at_once(x64, form, monkeypatch, T, S, causal, heads):
    """Also where a whole block sees nothing, and as other devices than a CPU go through the heads."""
    if heads == "at once":
        monkeypatch.setattr(attending, "head_by_head", lambda f, *heads: jax.vmap(f)(*heads))
    layer = fnbp.attention(4, 2, causal=causal, rotary=100.0)
    x, z = (jnp.asarray(rng.standard_normal((2, n, 8))) for n in (T, S))
    mask = np.asarray(rng.random((2, T, S)) < 0.3)
    mask[0, :128] = False
    params, state = drawn(layer, (x, z))
    dy = jnp.asarray(rng.standard_normal(x.shape))

    def run(params, x, mask):
        y, _, res = layer.forward(params, state, x, fnbp.Context(mask=mask))
        factors, dx = layer.backward(params, res, dy)
        return y, jax.tree.map(lambda f: f.total(), factors, is_leaf=lambda f: isinstance(f, fnbp.Factor)), dx

    for seen in (None, jnp.asarray(mask), jnp.asarray(mask.any(1))):
        blocks = jax.jit(run)(params, (x, z), seen)
        monkeypatch.setattr(attending, "SHORT", 1000)
        assert relative(blocks, jax.jit(lambda *args: run(*args))(params, (x, z), seen)) <= 1e-12
        monkeypatch.setattr(attending, "SHORT", 64)


@pytest.mark.parametrize("form", ["at once"], indirect=True)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_blocks_stay_finite_at_scores_that_overflow(form, scale):
    layer, x = fnbp.attention(2, causal=True), jnp.asarray(rng.standard_normal((1, 131, 4)), jnp.float32)
    params, state = layer.init(jax.random.key(0), x)
    params = params | {"Q": scale * params["Q"], "K": scale * params["K"]}
    y, _, res = layer.forward(params, state, x, fnbp.Context())
    _, dx = layer.backward(params, res, jnp.ones_like(y))
    wide = jax.tree.map(lambda a: np.asarray(a, float), params)
    assert relative(y, oracles.attention(wide, np.asarray(x, float), 2, causal=True)) <= 1e-3
    assert jnp.isfinite(dx).all()


@pytest.mark.parametrize("form", ["at once"], indirect=True)
def test_memory_grows_with_the_length_and_not_with_its_square(form):
    layer = fnbp.attention(2, causal=True)

    def held(T):
        x = jax.ShapeDtypeStruct((1, T, 32), jnp.float32)
        params, state = jax.eval_shape(layer.init, jax.random.key(0), x)
        run = jax.jit(fnbp.value_and_grad(layer, fnbp.half_squared_error()))
        return run.lower(params, state, x, x).compile().memory_analysis().temp_size_in_bytes

    assert held(2048) <= 2.5 * held(1024)


def run(layer, x, ctx=fnbp.Context()):
    params, state = layer.init(jax.random.key(0), x)
    return layer.forward(params, state, x, ctx)


Z = jnp.zeros
REFUSED = [
    (lambda: fnbp.attention(0), ValueError, r"attention\(0\): heads must be at least 1, got 0"),
    (
        lambda: fnbp.attention(6, 4),
        ValueError,
        r"attention\(6, 4\): heads must be a multiple of kv_heads, got 6 heads for 4",
    ),
    (lambda: fnbp.attention(2, rotary=0), ValueError, r"attention\(2\): rotary must be above 0, got 0"),
    (
        lambda: run(fnbp.attention(5), Z((2, 3, 12))),
        ValueError,
        r"must be a multiple of heads; got 12 features for 5 heads",
    ),
    (
        lambda: run(fnbp.attention(4, rotary=10.0), Z((2, 3, 12))),
        ValueError,
        r"an even number for each with rotary; got",
    ),
    (
        lambda: run(fnbp.attention(3), Z((2, 0, 12))),
        ValueError,
        r"x must be \(m, T, n\) with T and n at least 1, got shape",
    ),
    (lambda: run(fnbp.attention(3), Z((2, 12))), ValueError, r"x must be \(m, T, n\) .* got shape \(2, 12\)"),
    (lambda: run(fnbp.attention(3), Z((2, 3, 12), int)), TypeError, r"x must be a floating point array, got int32"),
    (
        lambda: run(fnbp.attention(3), (Z((2, 3, 12)),) * 3),
        ValueError,
        r"expected x, or a pair \(x, memory\), got a tuple of 3",
    ),
    (
        lambda: run(fnbp.attention(3), (Z((2, 3, 12)), Z((5, 3, 12)))),
        ValueError,
        r"x and memory must be alike, got float32",
    ),
    (
        lambda: run(fnbp.attention(3), Z((2, 3, 12)), fnbp.Context(mask=Z((2, 5), bool))),
        ValueError,
        r"the mask must have shape \(2, 3\) or \(2, 3, 3\), got \(2, 5\)",
    ),
    (
        lambda: run(fnbp.attention(3), Z((2, 3, 12)), fnbp.Context(mask=Z((2, 3)))),
        TypeError,
        r"attention\(3\): the mask must be of bool, .* got float32 of shape \(2, 3\); of a mask that is added",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_it_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_outside_jit_a_second_call_compiles_nothing():
    layer, x = fnbp.attention(2, causal=True), jnp.ones((2, 71, 8))
    params, state = layer.init(jax.random.key(0), x)
    forms = [attending.compiled(f) for f in (attending.attend_in_blocks, attending.attend_back_in_blocks)]
    sizes = []
    for _ in range(2):
        y, _, res = layer.forward(params, state, x, fnbp.Context())
        layer.backward(params, res, y)
        sizes.append([form._cache_size() for form in forms])
    assert sizes[0] == sizes[1] and all(sizes[0])
