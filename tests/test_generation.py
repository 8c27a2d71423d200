"""Generation: cached scores are those of the plain forward, tokens follow their distribution, and what is refused."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from fnbp.combinators.stepping import beginning, going_on, is_apart
from fnbp.combinators.unrolling import unrolled
from fnbp.layer import Traits
from fnbp.models import generate, generation

K, KEY = 11, jax.random.key(3)
LENGTHS = {"odd": (3, 5, 13), "even": (2, 4, 8)}  # examples, positions of the prompt, of the whole


def block(**options):
    return fnbp.transformer_block(12, 6, W="normal", **options)


def running_sum():
    """A layer of a user: its positions meet, and it states its steps."""

    def first(params, state, x, length):
        return jnp.cumsum(x, 1), x.sum(1, keepdims=True)

    def then(params, state, total, x):
        return total + x, total + x

    return fnbp.Layer(
        lambda key, x: ({}, {}),
        lambda params, state, x, ctx: (jnp.cumsum(x, 1), state, ()),
        lambda params, res, dy: ({}, jnp.flip(jnp.cumsum(jnp.flip(dy, 1), 1), 1)),
        "running_sum",
        traits=Traits(lambda name, x, mask: mask, steps=fnbp.Steps(first, then)),
    )


def scale(mask="position"):
    """A layer of a user: each position by itself."""
    return fnbp.stateless(
        lambda key, x: {"g": jax.random.normal(key, x.shape[-1:], x.dtype)},
        lambda params, x: (params["g"] * x, (x,)),
        lambda params, res, dy: ({"g": fnbp.Product(dy, res[0])}, params["g"] * dy),
        "scale",
        mask=mask,
    )


def by_time(mask="position"):
    """A layer of a user that says that it treats each position by itself, but counts them."""
    return fnbp.stateless(
        lambda key, x: {},
        lambda params, x: (x * jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None], ()),
        lambda params, res, dy: ({}, dy * jnp.arange(1, dy.shape[1] + 1)[:, None]),
        "by_time",
        mask=mask,
    )


def letters(*layers, before=()):
    return fnbp.serial(fnbp.embedding(K, 12), *before, *layers, fnbp.layer_norm(), fnbp.dense(K), name="net")


def cast(dtype):
    blocks, recurrent = fnbp.repeat(block(rotary=100.0), 2), fnbp.scan(fnbp.gru_cell(12))
    return letters(fnbp.cast(blocks, dtype), fnbp.cast(recurrent, dtype))


def frozen(layer):
    return letters(fnbp.freeze(fnbp.repeat(layer, 2)))


NETS = {
    "gpt": fnbp.models.gpt(K, 13, 3, 2, 6),
    "gpt with dropout": fnbp.models.gpt(K, 17, 2, 3, 12, rate=0.5),
    "positions": letters(block(), block(), before=(fnbp.positions(13),)),
    "sinusoids": letters(block(), before=(fnbp.sinusoids(),)),
    "rotary": letters(fnbp.repeat(block(rotary=100.0), 3)),
    "grouped": letters(fnbp.repeat(block(kv_heads=2, rotary=50.0), 3)),
    "one key head": letters(block(kv_heads=1), before=(fnbp.sinusoids(),)),
    "serial": letters(block(rotary=100.0), block(rotary=50.0, norm=fnbp.rms_norm)),
    "repeat in repeat": letters(fnbp.repeat(fnbp.serial(block(rotary=9.0), fnbp.repeat(block(), 2)), 3)),
    "swiglu": letters(fnbp.repeat(block(mlp=fnbp.swiglu(7, 12), b=None, rotary=10.0), 2)),
    "tied in a loop": fnbp.tie(letters(fnbp.repeat(block(rotary=9.0), 3)), (1, 0, 0, 0, 1, "Q"), (1, 0, 0, 0, 1, "O")),
    "cast": cast("float32"),
    "remat": letters(fnbp.repeat(fnbp.remat(block(rotary=100.0)), 3), fnbp.remat(block())),
    "parallel": letters(fnbp.parallel(fnbp.attention(3, causal=True), fnbp.dense(12), join="concat")),
    "frozen": frozen(block(rotary=100.0)),
    "lstm": letters(fnbp.stacked(fnbp.lstm_cell(7), fnbp.rnn_cell(5), rate=0.3)),
    "a user's": letters(running_sum(), scale(), fnbp.skip(fnbp.serial(scale("elementwise"), fnbp.silu()))),
    "batch norm": letters(fnbp.batch_norm(), block(rotary=100.0), fnbp.dropout(0.5)),
}


def made(net, dtype=None):
    """Params that are far from symmetric, of that dtype, and the state."""
    params, state = net.init(KEY, jnp.zeros((1, 2), jnp.int32))
    leaves, tree = jax.tree.flatten(params)
    away = [a + 0.3 * jax.random.normal(jax.random.fold_in(KEY, i), a.shape, a.dtype) for i, a in enumerate(leaves)]
    floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    state = jax.tree.map(lambda a: a if floating(a) else jnp.ones_like(a), state)  # batch_norm has counted a batch
    trees = jax.tree.unflatten(tree, away), state
    if dtype is None:
        return trees
    return jax.tree.map(lambda a: a.astype(dtype) if floating(a) else a, trees)


def loops(net):
    return (net.traits.turns is not None) + sum(map(loops, net.parts))


def test_the_loops_over_depth_are_written_out_for_one_position():
    for name, net in NETS.items():
        left = loops(unrolled(going_on(net))[0])
        assert left == (name == "tied in a loop"), name
    assert sum(map(loops, NETS.values())) == 10


def prompt_of(m, T):
    return jax.random.randint(jax.random.key(9), (m, T), 0, K, jnp.int32)


def stepped(net, params, state, tokens, T):
    """Scores of all positions: those of the prompt at once, then one a turn; by the plain forward; and of another text
    behind the prompt."""
    first, (then, in_turn, _) = beginning(net, tokens.shape[1]), unrolled(going_on(net))

    @jax.jit
    def run(params, state, tokens):
        scores, kept, _ = first.forward(params, state, tokens[:, :T], fnbp.Context())
        in_turns = in_turn(params)

        def turn(kept, token):
            scores, kept, _ = then.forward(in_turns, kept, token[:, None], fnbp.Context())
            return kept, scores[:, 0]

        _, later = jax.lax.scan(turn, in_turn(kept), tokens[:, T:].T)
        plain = lambda tokens: net.forward(params, state, tokens, fnbp.Context())[0]  # noqa: E731
        other = tokens.at[:, T - 1 :].set((tokens[:, T - 1 :] + 1) % K)
        return jnp.concatenate([scores, jnp.moveaxis(later, 0, 1)], 1), plain(tokens), plain(other)

    return run(params, state, tokens)


@pytest.mark.parametrize(
    ("name", "sizes"), [*((name, "odd") for name in NETS), *((name, "even") for name in ("gpt", "grouped", "lstm"))]
)
def test_scores_step_by_step_are_those_of_the_forward(x64, name, sizes):
    net, (m, T, S) = NETS[name], LENGTHS[sizes]
    found, expected, other = stepped(net, *made(net, float), prompt_of(m, S), T)
    within = 1e-5 if name == "cast" else 1e-12
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=within * float(abs(expected).max()), rtol=0)
    apart = abs(other - expected).max((0, 2))
    assert apart[: T - 1].max() < 1e-10 and apart[T - 1 :].min() > 1e-3


@pytest.mark.parametrize(("name", "options"), [*((name, {"key": KEY}) for name in NETS), ("gpt", {"temperature": 0})])
def test_the_same_tokens_as_without_a_cache(x64, name, options):
    net, (m, T, S) = NETS[name], LENGTHS["odd"]
    params, state = made(net, float)
    given = (net, params, state, prompt_of(m, T), S - T + 1)
    tokens = generate(*given, **options)
    assert tokens.shape == (m, S + 1) and tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens[:, :T], given[3])
    np.testing.assert_array_equal(tokens, generate(*given, **options, cache=False))


@functools.cache
def scores_of(net):
    """The plain forward, compiled."""
    return jax.jit(lambda params, state, tokens: net.forward(params, state, tokens, fnbp.Context())[0])


def by_hand(net, params, state, prompt, length, key, temperature, top_k=None, window=None, causal=True):
    """Tokens by the plain forward on all that was written; if causal, 0 stands behind it."""
    tokens, seen, plain = prompt, prompt, scores_of(net)
    for n in range(length):
        if window is not None and seen.shape[1] > window:
            seen = seen[:, -(window - max(1, window // 2) + 1) :]
        filled = jnp.pad(seen, ((0, 0), (0, 13 - seen.shape[1]))) if causal else seen
        scores = plain(params, state, filled)[:, seen.shape[1] - 1]
        if top_k is not None:  # stable: of equal scores the lowest token first
            order = jnp.argsort(-scores, -1, stable=True)
            rank = jnp.argsort(order, -1)
            scores = jnp.where(rank < top_k, scores, -jnp.inf)
        new = jax.random.categorical(jax.random.fold_in(key, n), scores / temperature)[:, None].astype(jnp.int32)
        tokens, seen = jnp.concatenate([tokens, new], 1), jnp.concatenate([seen, new], 1)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 2.0, "window": 5}], ids=str
)
def test_tokens_are_those_of_a_loop_by_hand(x64, cache, options):
    net = NETS["gpt"]
    params, state = made(net, float)
    length = 13 if "window" in options else 9
    given = (net, params, state, prompt_of(3, 5), length, KEY)
    np.testing.assert_array_equal(generate(*given, **options, cache=cache), by_hand(*given, **options))


WINDOWS = [(1, 12), (2, 2), (7, 6), (13, 29), (13, 1)]


@pytest.mark.parametrize(
    ("window", "length"), [(3, 29), (6, 13), *(pytest.param(*one, marks=pytest.mark.slow) for one in WINDOWS)]
)
def test_a_window_lets_it_write_more_than_it_has_positions(x64, window, length):
    net = NETS["gpt"]
    params, state = made(net, float)
    given = (net, params, state, prompt_of(2, 1), length, KEY)
    expected = by_hand(*given, 1.0, window=window)
    for cache in (True, False):
        np.testing.assert_array_equal(generate(*given, window=window, cache=cache), expected)


def test_a_top_k_of_1_is_greedy_and_of_all_is_none():
    net = NETS["gpt"]
    given = (net, *made(net), prompt_of(3, 5), 9)
    np.testing.assert_array_equal(generate(*given, KEY, top_k=1), generate(*given, temperature=0))
    np.testing.assert_array_equal(generate(*given, KEY, top_k=K), generate(*given, KEY))
    np.testing.assert_array_equal(generate(*given, KEY, temperature=1e-45), generate(*given, temperature=0.0))
    assert (generate(*given, KEY) != generate(*given, temperature=0)).any()


def by_table(scores):
    """A net that scores the next token by the last one alone."""
    net = fnbp.serial(fnbp.embedding(len(scores), len(scores)))
    return net, ({"E": jnp.asarray(scores, jnp.float32)},), ({},)


def test_of_equal_scores_the_lowest_token_is_the_highest():
    net, params, state = by_table([[0.0, 1, 1, 1, 0]] * 5)
    prompt = jnp.zeros((1000, 1), jnp.int32)
    assert set(np.unique(generate(net, params, state, prompt, 1, KEY, top_k=2)[:, 1])) == {1, 2}
    assert (generate(net, params, state, prompt, 1, temperature=0)[:, 1] == 1).all()
    assert (generate(net, params, state, prompt, 1, KEY, top_k=1)[:, 1] == 1).all()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_follow_their_distribution(temperature, top_k):
    table = np.random.default_rng(0).standard_normal((5, 5))
    net, params, state = by_table(table)
    tokens = np.asarray(
        generate(net, params, state, jnp.zeros((400, 1), jnp.int32), 50, KEY, temperature=temperature, top_k=top_k)
    )
    p = np.exp(table / temperature)
    if top_k is not None:
        p[p < np.sort(p, -1)[:, -top_k, None]] = 0
    p /= p.sum(-1, keepdims=True)
    counts = np.zeros((5, 5))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    due = p * counts.sum(-1, keepdims=True)
    assert (counts[due == 0] == 0).all()
    chi_squared = ((counts - due)[due > 0] ** 2 / due[due > 0]).sum()
    assert chi_squared < 2 * (due > 0).sum() + 20  # some 20 degrees of freedom: more is 1 in 10^5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "grouped", "lstm"])
def test_bfloat16(name):
    net = NETS[name]
    params, state = made(net, jnp.bfloat16)
    tokens = prompt_of(3, 11)
    found, expected, _ = stepped(net, params, state, tokens, 5)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=0.1 * float(abs(expected).max()))
    assert generate(net, params, state, tokens, 2, KEY).shape == (3, 13)


@pytest.mark.slow
def test_cast_to_bfloat16_keeps_keys_in_it():
    net = cast("bfloat16")
    params, state = made(net)
    _, kept, _ = beginning(net, 7).forward(params, state, prompt_of(2, 5), fnbp.Context())
    shapes = {(a.shape, str(a.dtype)) for a in jax.tree.leaves(kept) if a.ndim > 1}
    assert shapes == {((2, 2, 7, 6, 2), "bfloat16"), ((2, 12), "bfloat16")}  # depth, examples, positions, heads, d
    given = (net, params, state, prompt_of(3, 5), 7)
    assert (generate(*given, temperature=0) == generate(*given, temperature=0, cache=False)).mean() > 0.8


def test_it_is_compiled_once(monkeypatch):
    traced, right = [], generation.drawn
    monkeypatch.setattr(generation, "drawn", lambda *args: traced.append(1) or right(*args))
    net = fnbp.models.gpt(K, 13, 2, 2, 6)
    params, state = made(net)
    run = lambda net, key, heat: generate(net, params, state, prompt_of(3, 5), 7, key, temperature=heat)  # noqa: E731
    run(net, KEY, 1.0)
    assert len(traced) in (2, 3)  # at the prompt's end, and in the loop
    before = len(traced)
    is_apart.cache_clear()
    first = run(net, jax.random.key(1), 0.5)
    second = run(fnbp.models.gpt(K, 13, 2, 2, 6), jax.random.key(1), jnp.float32(0.5))  # an equal net
    assert len(traced) - before in (0, 2, 3)  # an array as temperature has another type than a number
    np.testing.assert_array_equal(first, second)
    before = len(traced)
    run(net, jax.random.key(2), 2.0)
    assert len(traced) == before and not is_apart.cache_info().misses


@pytest.mark.parametrize("cache", [True, False])
def test_in_jit_and_vmap(cache):
    net = NETS["gpt"]
    params, state = made(net)
    prompt, keys = prompt_of(3, 5), jax.random.split(KEY, 2)
    run = lambda key, heat=1.0: generate(net, params, state, prompt, 7, key, temperature=heat, cache=cache)  # noqa: E731
    one_by_one = jnp.stack([run(key) for key in keys])
    np.testing.assert_array_equal(jax.vmap(run)(keys), one_by_one)
    np.testing.assert_array_equal(jax.jit(run)(keys[0], jnp.float32(1)), one_by_one[0])
    inside = jax.jit(lambda params, prompt: generate(net, params, state, prompt, 7, keys[1], cache=cache))
    np.testing.assert_array_equal(inside(params, prompt), one_by_one[1])


def test_scores_that_are_not_finite_are_told():
    for bad in (np.nan, np.inf):
        net, params, state = by_table([[0.0, 9, 0], [0, bad, 0], [0, 0, 0]])
        run = functools.partial(generate, net, params, state, jnp.zeros((2, 1), int), 3)
        with pytest.raises(ValueError, match=r"generate: the scores for token \d of example \d are NaN or infinite"):
            run(KEY)
        assert (jax.jit(run)(KEY) == -1).any()
    net, params, state = by_table([[-np.inf, 0, -np.inf]] * 3)
    assert (generate(net, params, state, jnp.zeros((2, 1), int), 3, KEY)[:, 1:] == 1).all()


def test_a_prompt_may_be_of_numpy_and_of_small_integers():
    net = NETS["gpt"]
    params, state = made(net)
    prompt = np.asarray(prompt_of(3, 5))
    expected = generate(net, params, state, prompt, 3, temperature=0)
    for dtype in (np.uint8, np.int64):
        found = generate(net, params, state, prompt.astype(dtype), 3, temperature=0)
        np.testing.assert_array_equal(found, expected)


PARAMS, STATE = made(NETS["gpt"])
PROMPT = np.asarray(prompt_of(3, 5))


def of(net=None, prompt=PROMPT, length=3, **options):
    """A call that is right but for what is given."""
    params, state = (PARAMS, STATE) if net is None else net.init(KEY, jnp.zeros((1, 5), int))
    return generate(net or NETS["gpt"], params, state, prompt, length, **{"key": KEY} | options)


def replaced_attention(path, layer):
    if not layer.name.startswith("attention"):
        return layer
    return fnbp.replace_functions(layer, forward=lambda params, state, x, ctx: (x, state, ()))


def first_few(n):
    """A layer of a user: nothing but the first n tokens."""
    return fnbp.stateless(
        lambda key, x: {},
        lambda params, x: (jnp.where(jnp.arange(x.shape[-1]) < n, x, -jnp.inf), ()),
        lambda params, res, dy: ({}, dy),
        f"first_few({n})",
        mask="position",
    )


def test_a_score_of_minus_infinity_hides_nothing():
    layer = first_few(8)
    mixed = fnbp.replace_functions(
        layer, forward=lambda params, state, x, ctx: (layer.forward(params, state, jnp.cumsum(x, 1), ctx)[0], state, ())
    )
    before = fnbp.embedding(K, 6), fnbp.dense(K)
    of(fnbp.serial(*before, layer))
    with pytest.raises(TypeError, match=r"first_few\(8\): what it makes of a position depends"):
        of(fnbp.serial(*before, mixed))


@pytest.mark.parametrize("T", [1e-300, 1e-30, 1e30, 1e38, 3.4e38, 1e300])
def test_no_temperature_draws_a_token_that_cannot_be(T):
    net = fnbp.serial(fnbp.embedding(K, 6), fnbp.dense(K), first_few(8))
    params, state = made(net)
    prompt = np.zeros((60, 2), int)
    scores = np.asarray(net.forward(params, state, jnp.asarray(prompt), fnbp.Context())[0])[0, -1]
    drawn = {k: set(np.asarray(generate(net, params, state, prompt, 1, KEY, temperature=T, top_k=k))[:, 2].tolist())
             for k in (None, 2)}  # fmt: skip
    best = set(np.argsort(scores)[-2:].tolist())
    assert drawn[None] <= set(range(8)) and drawn[2] <= best
    if T > 1:
        assert len(drawn[None]) == 8 and drawn[2] == best  # all alike
    else:
        assert drawn[None] == drawn[2] == {int(np.argmax(scores))}


@pytest.mark.parametrize("T, due", [(-1.0, False), (np.nan, False), (np.inf, True), (0.0, True), (1e38, True)])
def test_in_jit_a_temperature_that_is_none_draws_minus_one(T, due):
    net = NETS["rotary"]
    params, state = made(net)
    run = jax.jit(lambda T: generate(net, params, state, prompt_of(3, 5), 4, KEY, temperature=T, top_k=3))
    assert ((np.asarray(run(jnp.float32(T)))[:, 5:] >= 0) == due).all()


def test_wrong_params_are_not_taken_for_a_wrong_length():
    with pytest.raises(ValueError, match=r"^net: params must have \d entries"):
        generate(NETS["rotary"], (), STATE, PROMPT, 3, KEY)


MIXES = r"mixes positions, or does not say that it keeps them apart, .*Traits\(steps=fnbp\.Steps\(first, then\)\)"
REFUSED = [
    (lambda: of(prompt=PROMPT.astype(float)), TypeError, "the prompt must be an array of integers, got float"),
    (lambda: of(prompt=PROMPT[0]), ValueError, r"prompt must be \(m, T\) with m and T at least 1, got shape \(5,\)"),
    (lambda: of(prompt=PROMPT[:, :0]), ValueError, r"with m and T at least 1, got shape \(3, 0\)"),
    (lambda: of(prompt=PROMPT[:0]), ValueError, r"with m and T at least 1, got shape \(0, 5\)"),
    (lambda: of(prompt=np.array([[3, 11]])), ValueError, r"token 11 of the prompt at index \[0, 1\] is outside 0"),
    (lambda: of(prompt=np.array([[-1]])), ValueError, r"token -1 of the prompt at index \[0, 0\] is outside 0\.\.10"),
    (lambda: of(temperature=-0.1), ValueError, r"temperature must be 0 or above, and finite, got -0\.1"),
    (lambda: of(temperature=float("nan")), ValueError, r"temperature must be 0 or above, and finite, got nan"),
    (lambda: of(temperature=float("inf")), ValueError, r"got inf"),
    (lambda: of(temperature="hot"), TypeError, r"temperature must be a number, got 'hot'"),
    (lambda: of(temperature=np.str_("a")), TypeError, r"temperature must be a number"),
    (lambda: of(temperature=True), TypeError, r"temperature must be a number, got True"),
    (lambda: of(temperature=jnp.ones(2)), TypeError, r"temperature must be one real number, got float32 of shape"),
    (lambda: of(key=None), ValueError, r"a temperature of 1\.0 draws tokens, so it needs a key, e\.g\. jax\.random"),
    (lambda: of(key=3), TypeError, r"generate: expected a random key"),
    (lambda: of(key=3, temperature=0), TypeError, r"generate: expected a random key"),
    (lambda: of(top_k=0), ValueError, r"top_k must be at least 1, got 0"),
    (lambda: of(top_k=12), ValueError, r"top_k must be from 1 to 11, the scores of the net, got 12"),
    (lambda: of(top_k=1.0), TypeError, r"top_k must be a whole number, got 1\.0"),
    (lambda: of(length=0), ValueError, r"length must be at least 1, got 0"),
    (lambda: of(length=2.0), TypeError, r"length must be a whole number"),
    (lambda: of(window=4), ValueError, r"the prompt has 5 positions, more than the window of 4"),
    (lambda: of(window=0), ValueError, r"window must be at least 1, got 0"),
    (lambda: of(cache=1), TypeError, r"cache must be a bool"),
    (lambda: generate(3, PARAMS, STATE, PROMPT, 3), TypeError, r"net must be a Layer"),
    (lambda: of(length=10), ValueError, r"the net does not take 14 positions .*positions\(13\).*A shorter window"),
    (lambda: of(window=14, length=30), ValueError, r"the net does not take 14 positions"),
    (lambda: of(length=10, cache=False), ValueError, r"does not take 14 positions"),
    (lambda: of(prompt=np.zeros((1, 14), int)), ValueError, r"does not take 16 positions"),
    (lambda: of(letters(fnbp.attention(2))), TypeError, r"net\[1\]\.attention\(2\) " + MIXES),
    (lambda: of(letters(fnbp.bidirectional(fnbp.gru_cell(6)))), TypeError, r"scan\(gru_cell\(6\), reverse\) " + MIXES),
    (lambda: of(letters(scale(mask=lambda name, x, mask: mask))), TypeError, r"net\[1\]\.scale " + MIXES),
    (lambda: of(letters(fnbp.conv(12, (3,)))), TypeError, r"conv\(12, \(3,\)\) " + MIXES),
    (lambda: of(letters(fnbp.repeat(by_time(), 2))), TypeError, r"net\[1\]\.repeat\(2\)\[0\]\.by_time: .* needs steps"),
    (lambda: of(letters(fnbp.group_norm(3))), TypeError, r"group_norm\(3\): .* depends on where that stands"),
    (lambda: of(fnbp.map_layers(replaced_attention, NETS["rotary"])), TypeError, r"attention\(6\): its forward was"),
    (lambda: of(frozen(fnbp.attention(2))), TypeError, r"attention\(2\) " + MIXES),
    (lambda: of(fnbp.serial(fnbp.embedding(7, 5), fnbp.last(), fnbp.dense(7))), ValueError, r"must return scores \(m"),
    (lambda: of(fnbp.serial(fnbp.embedding(7, 5), fnbp.dense(8))), ValueError, r"scores 8 tokens, but does not read"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_it_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_is_masked_by_the_reference_needs_no_steps(x64):
    net = letters(fnbp.attention(2))  # every position sees every other one that is written
    params, state = made(net, float)
    given = (net, params, state, prompt_of(3, 5), 4, KEY)
    np.testing.assert_array_equal(generate(*given, cache=False), by_hand(*given, 1.0, causal=False))


def test_a_layer_that_states_too_little_is_told():
    traits = running_sum().traits
    for steps, words in (
        (replace(traits.steps, first=lambda *args: 3), "Steps: first must return"),
        (replace(traits.steps, then=lambda *args: (1, 2, 3)), "Steps: then must return"),
    ):
        net = letters(running_sum()._replace(traits=replace(traits, steps=steps)))
        with pytest.raises(TypeError, match=words):
            of(net)
