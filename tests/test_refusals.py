"""What no layer can be made of, or make something of: each raises before any compute, saying what came and was due."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import fnbp
from tests.cases import CASES, draw

TRAINING = fnbp.Context(jax.random.key(0), train=True)

KEY, TWO = jax.random.key(0), fnbp.serial(fnbp.dense(4), fnbp.dense(4))


def forward(layer, shape, dtype=jnp.float32, ctx=fnbp.Context(), x=None):
    """A layer on zeros of that shape, or on x."""
    x = jnp.zeros(shape, dtype) if x is None else x
    params, state = layer.init(jax.random.key(0), x)
    return layer.forward(params, state, x, ctx)


OPTIONS = [
    (lambda: fnbp.conv(0, 3), ValueError, r"conv\(0, 3\): n_out must be at least 1, got 0"),
    (lambda: fnbp.conv(5, 0), ValueError, r"conv\(5, 0\): kernel must be at least 1, got 0"),
    (lambda: fnbp.conv(5, (3, 2.5)), TypeError, r"kernel must be a whole number, got 2.5"),
    (lambda: fnbp.conv(5, 3, stride=0), ValueError, r"stride must be at least 1, got 0"),
    (lambda: fnbp.conv(5, 3, padding="same"), ValueError, r"padding must be 'SAME', 'VALID', or numbers .* got 'same'"),
    (lambda: fnbp.conv(5, 3, padding=-1), ValueError, r"padding must be .* got -1"),
    (
        lambda: fnbp.conv(5, 3, padding=((1, 2), (0, 1.5))),
        ValueError,
        r"padding must be .* got \(\(1, 2\), \(0, 1.5\)\)",
    ),
    (lambda: fnbp.conv(7, 3, groups=2), ValueError, r"n_out must be a multiple of groups, got 7 for 2 groups"),
    (lambda: fnbp.conv(7, 3, groups=0), ValueError, r"groups must be at least 1, got 0"),
    (lambda: fnbp.max_pool(0), ValueError, r"max_pool\(0\): kernel must be at least 1, got 0"),
    (lambda: fnbp.avg_pool(2, count_padding=1), TypeError, r"count_padding must be a bool, got int 1"),
    (lambda: fnbp.reshape(-1, -1), ValueError, r"reshape\(-1, -1\): sizes must be at least 1, or -1 once"),
    (lambda: fnbp.reshape(2.0), TypeError, r"reshape\(2.0\): sizes must be whole numbers, got 2.0"),
    (lambda: fnbp.layer_norm(0), ValueError, r"layer_norm: eps must be above 0, got 0"),
    (lambda: fnbp.group_norm(0), ValueError, r"group_norm\(0\): groups must be at least 1, got 0"),
    (lambda: fnbp.batch_norm(momentum=0), ValueError, r"batch_norm: momentum must be in \(0, 1\], got 0"),
    (lambda: fnbp.dropout(1), ValueError, r"dropout\(1\): rate must be in \[0, 1\), got 1"),
    (lambda: fnbp.drop_path(-0.1), ValueError, r"drop_path\(-0.1\): rate must be in \[0, 1\), got -0.1"),
    (lambda: fnbp.embedding(0, 3), ValueError, r"embedding\(0, 3\): size must be at least 1, got 0"),
    (lambda: fnbp.embedding(3, 1.5), TypeError, r"width must be a whole number, got 1.5"),
    (lambda: fnbp.positions(0), ValueError, r"positions\(0\): length must be at least 1, got 0"),
    (lambda: fnbp.sinusoids(0), ValueError, r"sinusoids: base must be above 0, got 0"),
    (
        lambda: fnbp.conv(5, 3, padding=((1, 2, 3), (1, 1, 1))).init(KEY, jnp.zeros((2, 7, 7, 3))),
        ValueError,
        r"padding of an",
    ),
    (lambda: fnbp.dense(3, b=False), ValueError, r"dense\(3\): b must be an initializer, .* got False"),
    (lambda: fnbp.conv(3, 5, b=0), ValueError, r"conv\(3, 5\): b must be an initializer, .* got 0"),
    (lambda: fnbp.gelu("none"), TypeError, r"gelu: approximate must be a bool, got str 'none'"),
    (lambda: fnbp.elu("a"), TypeError, r"elu: alpha must be a number, got 'a'"),
    (lambda: fnbp.layer_norm(True), TypeError, r"layer_norm: eps must be a number, got True"),
    (lambda: fnbp.dropout("0.5"), TypeError, r"dropout\(0.5\): rate must be a number, got '0.5'"),
    (lambda: fnbp.batch_norm(momentum="a"), TypeError, r"batch_norm: momentum must be a number, got 'a'"),
    (lambda: fnbp.attention(2, rotary=True), TypeError, r"attention\(2\): rotary must be a number, got True"),
    (lambda: fnbp.attention(2, causal="no"), TypeError, r"attention\(2\): causal must be a bool, got str 'no'"),
    (lambda: fnbp.cast(fnbp.relu(), None), TypeError, r"cast: expected a floating point dtype, got None"),
    (lambda: fnbp.cast(fnbp.relu(), "bf16"), TypeError, r"cast: expected a floating point dtype, got 'bf16'"),
    (lambda: fnbp.stacked(), ValueError, r"stacked: expected at least one cell"),
    (
        lambda: fnbp.transformer_block(4, 2, norm=fnbp.layer_norm()),
        TypeError,
        r"norm must make a layer .* got layer_norm",
    ),
    (lambda: fnbp.models.resnet("8"), TypeError, r"resnet: depth must be a whole number, got '8'"),
    (lambda: fnbp.models.gpt(5, 7, 2, 2, "4"), TypeError, r"gpt: width must be a whole number, got '4'"),
    (lambda: fnbp.tie(TWO, (0, "W"), (-1, "W")), TypeError, r"names and whole numbers from 0, .* got \(-1, 'W'\)"),
    (lambda: fnbp.tie(TWO, 0, 1), TypeError, r"tie: keys must be a tuple .* got 0"),
    (lambda: fnbp.tie(TWO, (0, "W"), (0, "W")), ValueError, r"tie: source and target must be two parameters"),
    (lambda: fnbp.tie(TWO, (0,), (1,)).init(KEY, jnp.zeros((2, 4))), ValueError, r"\(0,\) must lead to one .* a dict"),
]


def answered(layer, shape, params=None, state=None, x=None):
    """A layer asked with other params, state or x than those of its init."""
    made = layer.init(KEY, jnp.zeros(shape))
    held = [other if other is not None else own for other, own in zip((params, state), made, strict=True)]
    return layer.forward(*held, jnp.zeros(shape) if x is None else x, fnbp.Context())


INTEGERS = jnp.zeros((2, 4), int)
BATCH = {"mean": jnp.zeros(1), "var": jnp.zeros(1), "count": 1}
INPUTS = [
    *(
        (
            lambda layer=layer: answered(layer, (2, 4), x=INTEGERS),
            TypeError,
            rf"{name}.*: x must be a floating point array",
        )
        for layer in (
            fnbp.dense(3),
            fnbp.bias(),
            fnbp.layer_norm(),
            fnbp.rms_norm(),
            fnbp.relu(),
            fnbp.gelu(),
            fnbp.softmax(),
            fnbp.dropout(0.5),
            fnbp.skip(fnbp.relu()),
        )
        for name in (layer.name.partition("(")[0],)
    ),
    (
        lambda: forward(fnbp.softmax(), (), x=(jnp.zeros((2, 3)),)),
        TypeError,
        r"got a tuple of 1: float32 of shape \(2, 3\)",
    ),
    (
        lambda: forward(fnbp.skip(fnbp.attention(2)), (), x=(jnp.zeros((2, 3, 4)),) * 2),
        TypeError,
        r"skip: x must be a fl",
    ),
    (
        lambda: forward(fnbp.dense(3), (2, 0)),
        ValueError,
        r"dense\(3\): x must have a last axis of at least 1, got .*2, 0",
    ),
    (
        lambda: forward(fnbp.dense(3), ()),
        ValueError,
        r"dense\(3\): x must have a last axis of at least 1, got shape \(\)",
    ),
    (
        lambda: forward(fnbp.attention(2), (2, 3, 0)),
        ValueError,
        r"attention\(2\): x must be \(m, T, n\) with T and n at",
    ),
    (lambda: forward(fnbp.scan(fnbp.rnn_cell(3)), (2, 3)), ValueError, r"rnn_cell\(3\): x must be \(m, d\) with d at"),
    (
        lambda: fnbp.group_norm(3).init(KEY, jnp.zeros((2, 5, 4))),
        ValueError,
        r"group_norm\(3\): x must be \(m, \*s, c\)",
    ),
    (lambda: answered(fnbp.batch_norm(), (2, 4), state={}), ValueError, r"batch_norm: state must hold .*'count'"),
    (
        lambda: answered(fnbp.batch_norm(), (2, 4), state=BATCH),
        ValueError,
        r"state\['mean'\] has shape \(1,\), it must be",
    ),
    (
        lambda: answered(fnbp.freeze(fnbp.dense(4)), (2, 4), state={}),
        ValueError,
        r"freeze\(dense\(4\)\): state must hold",
    ),
    (
        lambda: answered(fnbp.freeze(TWO), (2, 4), TWO.init(KEY, jnp.zeros((2, 4)))[0]),
        ValueError,
        r"freeze.*params must",
    ),
    (
        lambda: answered(fnbp.tie(TWO, (0, "W"), (1, "W")), (2, 4), (TWO.init(KEY, jnp.zeros((2, 4)))[0],)),
        ValueError,
        r"tie: params hold \(1, 'W'\), which is \(0, 'W'\) here",
    ),
    (
        lambda: forward(fnbp.ragged(fnbp.last()), (), x=(jnp.zeros((2, 3, 4)), [1, 2])),
        TypeError,
        r"lengths must be an ar",
    ),
    (
        lambda: forward(fnbp.conv(5, 5, padding="VALID"), (2, 3, 11, 7)),
        ValueError,
        r"conv\(5, 5\): the kernel spans \(5, 5\) positions, x of shape \(2, 3, 11, 7\) has \(3, 11\), padded by",
    ),
    (
        lambda: forward(fnbp.conv(6, 3, groups=3), (2, 11, 7)),
        ValueError,
        r"channels of x must be a multiple .* got 7 for 3",
    ),
    (
        lambda: forward(fnbp.conv(6, (3, 3)), (2, 11, 7)),
        ValueError,
        r"kernel \(3, 3\) is for 2 spatial axes, x .* has 1",
    ),
    (lambda: forward(fnbp.conv(6, 3), (2, 7)), ValueError, r"x must be \(m, \*spatial, channels\), got shape \(2, 7\)"),
    (lambda: forward(fnbp.conv(6, 3), (2, 5, 7), jnp.uint8), TypeError, r"x must be a floating point array, got uint8"),
    (
        lambda: fnbp.conv(6, 3).forward(
            {"W": jnp.zeros((6, 3, 5)), "b": jnp.zeros(6)}, {}, jnp.zeros((2, 11, 7)), TRAINING
        ),
        ValueError,
        r"conv\(6, 3\): params\['W'\] has shape \(6, 3, 5\), x of shape \(2, 11, 7\) needs \(6, 3, 7\)",
    ),
    (
        lambda: forward(fnbp.conv_transpose(6, 2, padding=3), (2, 4, 7)),
        ValueError,
        r"leaves nothing of x of shape \(2, 4, 7\)",
    ),
    (lambda: forward(fnbp.max_pool(3), (2, 2, 7)), ValueError, r"max_pool\(3\): the kernel spans \(3,\) positions"),
    (lambda: forward(fnbp.max_pool(2, padding=2), (2, 5, 7)), ValueError, r"leaves windows without a number of x"),
    (
        lambda: forward(fnbp.global_avg_pool(), (2, 7)),
        ValueError,
        r"x must be \(m, \*positions, channels\), got shape \(2, 7\)",
    ),
    (
        lambda: forward(fnbp.reshape(3, 5), (2, 7)),
        ValueError,
        r"reshape\(3, 5\): an example of x, of shape \(7,\), has 7",
    ),
    (
        lambda: forward(fnbp.group_norm(3), (2, 5, 7)),
        ValueError,
        r"group_norm\(3\): .* multiple of groups, got shape \(2, 5, 7\)",
    ),
    (
        lambda: forward(fnbp.batch_norm(), (1, 7), ctx=TRAINING),
        ValueError,
        r"one number a channel, which has no variance",
    ),
    (lambda: forward(fnbp.batch_norm(), (5, 7)), ValueError, r"no training step yet.* Context\(train=True\)"),
    (lambda: forward(fnbp.dropout(0.5), (5, 7), ctx=fnbp.Context(train=True)), ValueError, r"training needs a key"),
    (lambda: forward(fnbp.dropout(0.5), (5, 7), ctx=fnbp.Context(7, train=True)), TypeError, r"expected a random key"),
    (lambda: forward(fnbp.embedding(13, 3), (2, 5)), TypeError, r"x must be an array of integers, got float32"),
    (
        lambda: forward(fnbp.embedding(13, 3), None, x=jnp.array([[0, 13]])),
        ValueError,
        r"embedding\(13, 3\): token 13 at index \[0, 1\] is outside 0..12",
    ),
    (
        lambda: forward(fnbp.embedding(13, 3), None, x=jnp.array([-1])),
        ValueError,
        r"token -1 at index \[0\] is outside",
    ),
    (
        lambda: forward(fnbp.positions(5), (2, 7, 3)),
        ValueError,
        r"\(m, t, d\) with t from 1 to 5, got shape \(2, 7, 3\)",
    ),
    (lambda: forward(fnbp.positions(5), (2, 0, 3)), ValueError, r"t from 1 to 5, got shape \(2, 0, 3\)"),
    (lambda: forward(fnbp.sinusoids(), (2, 0, 3)), ValueError, r"t at least 1, got shape \(2, 0, 3\)"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), OPTIONS + INPUTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_it_is_refused(call, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user meets, who has no such checks
    with pytest.raises(error, match=message):
        call()


def test_under_jit_a_token_outside_is_nan():
    layer = fnbp.embedding(13, 3)
    params, state = layer.init(jax.random.key(0), jnp.zeros((1,), int))
    y = jax.jit(lambda x: layer.forward(params, state, x, fnbp.Context())[0])(jnp.array([-1, 0, 12, 13]))
    assert jnp.isnan(y).all(1).tolist() == [True, False, False, True]


def test_under_jit_batch_norm_before_training_is_nan():
    layer = fnbp.batch_norm()
    x = jnp.ones((5, 7))
    params, state = layer.init(jax.random.key(0), x)
    run = jax.jit(layer.forward)
    assert jnp.isnan(run(params, state, x, fnbp.Context())[0]).all()
    state = run(params, state, x, TRAINING)[1]
    assert jnp.isfinite(run(params, state, x, fnbp.Context())[0]).all()


def no_arrays(case):
    """What stands for x where an array is expected, or is an array of another rank or another kind of numbers."""
    x = draw(case, case.shapes[0], jnp.float32)[2]
    return {
        "rank_0": jnp.zeros((), x.dtype),
        "none": None,
        "str": "abc",
        "list": [1.0, 2.0],
        "dict": {"a": jnp.zeros(3)},
        "bool": x.astype(bool),
        "complex": x.astype(jnp.complex64),
        "object": np.zeros(x.shape, object),
        "empty": x[:0],
    }


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_what_is_no_array_for_it_is_refused_by_name(case, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    params, state, _, _ = draw(case, case.shapes[0], jnp.float32)
    names = {path.rpartition(".")[2] for path, _ in fnbp.leaves(case.layer)} | {case.layer.name}
    names |= {name.removeprefix("from_jax(").removesuffix(")") for name in names}
    for what, x in no_arrays(case).items():
        calls = (case.layer.init, (KEY, x)), (case.layer.forward, (params, state, x, case.context))
        for i, (call, args) in enumerate(calls):
            try:
                made = call(*args)
            except (ValueError, TypeError) as error:
                told = "\n".join([str(error), *getattr(error, "__notes__", [])])
                assert any(name in told for name in names), (what, call.__name__, told)
                assert len(str(error)) <= 400, (what, str(error))
            else:
                y = made[0] if i else jnp.zeros(())
                assert jnp.issubdtype(y.dtype, jnp.floating) and jnp.isfinite(y).all(), (what, y.dtype)


AROUND = {
    "serial": lambda f: fnbp.serial(f),
    "skip": lambda f: fnbp.skip(f),
    "cast": lambda f: fnbp.cast(f, "bfloat16"),
    "remat": lambda f: fnbp.remat(f),
    "repeat": lambda f: fnbp.repeat(f, 2),
    "parallel": lambda f: fnbp.parallel(f, fnbp.identity(), join="sum"),
    "freeze": lambda f: fnbp.freeze(f),
}


@pytest.mark.parametrize("name", AROUND)
def test_around_a_layer_that_takes_anything_what_is_no_array_is_refused(name):
    net = AROUND[name](fnbp.cast(fnbp.elu(), "float32"))
    params, state = net.init(KEY, jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match=r"must be an? (floating point )?array, got str 'abc'"):
        net.forward(params, state, "abc", fnbp.Context())
