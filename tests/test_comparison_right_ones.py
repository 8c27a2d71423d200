"""Right backwards that compare once accused, and wrong ones beside them that it must go on catching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp

RNG = np.random.default_rng(0)
SEEN = np.tril(np.ones((5, 5), bool))
KEEP = RNG.random((5, 7)) < 0.7


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def softmax_of_kept(s, kept):
    largest = jnp.max(jnp.where(kept, s, -1e30), -1, keepdims=True)
    e = jnp.where(kept, jnp.exp(s - largest), 0)
    total = e.sum(-1, keepdims=True)
    return jnp.where(kept.any(-1, keepdims=True), e / jnp.where(total == 0, 1, total), 0)


def softmax_backward(args, d):
    y = softmax_of_kept(*args)
    return y * (d - jnp.sum(d * y, -1, keepdims=True)), None


def a_row_is_empty():
    kept = RNG.random((4, 5)) < 0.6
    kept[0], kept[1:, 0] = False, True
    return kept


def variance(x):
    return jnp.mean(x * x) - jnp.mean(x) ** 2


def with_rule(plain, forward, backward):
    f = jax.custom_vjp(plain)
    f.defvjp(forward, backward)
    return f


def variance_rule(slope):
    return with_rule(variance, lambda x: (variance(x), x), lambda x, d: (slope * d * (x - x.mean()) / x.size,))


def softmax_rule(slope):
    def forward(x):
        y = jnp.exp(x - jax.scipy.special.logsumexp(x, -1, keepdims=True))
        return y, y

    return with_rule(
        lambda x: jax.nn.softmax(x, -1), forward, lambda y, d: (slope * y * (d - jnp.sum(d * y, -1, keepdims=True)),)
    )


def straight_through(x):
    c = jnp.clip(x, -1, 1)
    return c + jax.lax.stop_gradient(jnp.sign(c) - c)


def of_function(f, *args, **options):
    return lambda backward: fnbp.compare(f, *args, vjp=backward, **options)


def centred(x):
    return jnp.mean((x - x.mean()) ** 2)


def not_zero(x):
    return bool((np.asarray(x) != 0).all())


# name: (backward -> Report, a right backward, a wrong one)
CASES = {
    "a number of Python": (
        of_function(lambda x, c: x * c, normal(3), 2.5),
        lambda a, d: (d * a[1], jnp.sum(d * a[0])),
        lambda a, d: (d * a[1], jnp.sum(d)),
    ),
    "an output in bfloat16, whatever comes in": (
        of_function(lambda x: (2 * x).astype(jnp.bfloat16), normal(3)),
        lambda a, d: (2 * d.astype(a[0].dtype),),
        lambda a, d: (3 * d.astype(a[0].dtype),),
    ),
    "denormal numbers that XLA takes for 0": (
        of_function(jnp.abs, abs(normal(5))),
        lambda a, d: (d * jnp.sign(a[0]),),
        lambda a, d: (jnp.where(a[0] < 1e-30, 0.5, 1) * d * jnp.sign(a[0]),),
    ),
    "a domain without 0": (
        of_function(jnp.prod, normal(5), domain=not_zero),
        lambda a, d: (d * jnp.prod(a[0]) / a[0],),
        lambda a, d: (d * jnp.prod(a[0]),),
    ),
    "the largest number in the code": (
        of_function(lambda s: jnp.where(SEEN, s, jnp.finfo(s.dtype).min), normal(5, 5)),
        lambda a, d: (d * SEEN,),
        lambda a, d: (d,),
    ),
    "an empty row beside others": (
        of_function(softmax_of_kept, normal(4, 5), a_row_is_empty()),
        softmax_backward,
        lambda a, d: (softmax_of_kept(*a) * d, None),
    ),
    "terms that cancel at denormal numbers": (
        of_function(lambda x: x - jnp.tanh(x), normal(7)),
        lambda a, d: (d * jnp.tanh(a[0]) ** 2,),
        lambda a, d: (jnp.where(abs(a[0]) < 1e-30, d, d * jnp.tanh(a[0]) ** 2),),
    ),
    "a clip whose slope is passed through": (
        of_function(straight_through, normal(7)),
        lambda a, d: (jnp.where(abs(a[0]) <= 1, d, 0),),
        lambda a, d: (jnp.where(abs(a[0]) <= 1, d, -d),),
    ),
    "an output that is exactly 0 in the reference": (
        lambda slope: fnbp.compare(variance_rule(slope), normal(5, 8), reference=centred),
        2.0,
        2.1,
    ),
    "a forward rule by another algorithm": (
        lambda slope: fnbp.compare(softmax_rule(slope), 10 * normal(5, 8)),
        1.0,
        1.1,
    ),
    "sizes that take multiples of 4": (
        of_function(lambda x: x.reshape(-1, 4).sum(-1), normal(8), sizes=lambda n: (multiple_of_4(n),)),
        lambda a, d: (jnp.repeat(d, 4),),
        lambda a, d: (jnp.tile(d, 4),),
    ),
}  # fmt: skip


def multiple_of_4(n):
    if n % 4:
        raise ValueError("n must be a multiple of 4")
    return normal(n)


LONG = {
    "an empty row beside others",
    "the largest number in the code",
    "sizes that take multiples of 4",
    "a forward rule by another algorithm",
    "an output in bfloat16, whatever comes in",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in CASES])
def test_a_right_backward_is_not_accused_and_a_wrong_one_is(name):
    compare, right, wrong = CASES[name]
    report = compare(right)
    assert report.ok, report.first_fault
    assert not any("is not finite" in row.hint for row in report.faults)
    assert not compare(wrong).ok


def test_no_sizes_at_all_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"takes none of the sizes .*sizes\(2\) raises ValueError: no"):
        fnbp.compare(jnp.sin, normal(3), vjp=lambda a, d: (d * jnp.cos(a[0]),), sizes=refusing)


def refusing(n):
    raise ValueError("no")


def in_training(layer, slope=1.0):
    """A combinator that calls its part in training only."""

    def init(key, x):
        params, state = layer.init(key, x)
        return (params,), (state,)

    def forward(params, state, x, ctx):
        if not ctx.train:
            return x, state, None
        y, new, res = layer.forward(params[0], state[0], x, ctx)
        return x + y, (new,), res

    def backward(params, res, dy):
        if res is None:
            return (jax.tree.map(jnp.zeros_like, params[0]),), slope * dy
        factors, dx = layer.backward(params[0], res, dy)
        return (factors,), dy + slope * dx

    return fnbp.Layer(init, forward, backward, "in_training", (layer,), lambda parts: in_training(parts[0], slope))


def twice(layer, slope=1.0):
    """A combinator that runs its part two times, and hands its state on."""

    def init(key, x):
        params, state = layer.init(key, x)
        return (params,), (state,)

    def forward(params, state, x, ctx):
        y, between, first = layer.forward(params[0], state[0], x, ctx)
        z, new, second = layer.forward(params[0], between, y, ctx)
        return z, (new,), (first, second)

    def backward(params, res, dy):
        later, dy = layer.backward(params[0], res[1], dy)
        earlier, dx = layer.backward(params[0], res[0], slope * dy)
        is_factor = lambda node: isinstance(node, fnbp.Factor)  # noqa: E731
        return (jax.tree.map(lambda a, b: a + b, earlier, later, is_leaf=is_factor),), dx

    traits = fnbp.Traits(mixes=layer.traits.mixes, tied=((0, "gamma"), (0, "beta")))
    return fnbp.Layer(init, forward, backward, "twice", (layer,), lambda parts: twice(parts[0], slope), traits)


TRAIN = fnbp.Context(jax.random.key(1), train=True)


@pytest.mark.parametrize(
    "make, layer, ctx",
    [
        pytest.param(
            in_training, fnbp.dense(5), fnbp.Context(), id="in training, at inference", marks=pytest.mark.slow
        ),
        pytest.param(in_training, fnbp.dense(5), TRAIN, id="in training", marks=pytest.mark.slow),
        pytest.param(twice, fnbp.batch_norm(), fnbp.Context(), id="twice, at inference", marks=pytest.mark.slow),
        pytest.param(twice, fnbp.batch_norm(), TRAIN, id="twice, in training", marks=pytest.mark.slow),
    ],
)
def test_combinators_that_nobody_can_look_into_are_compared_as_one(make, layer, ctx):
    report = fnbp.compare(make(layer), normal(7, 5), ctx=ctx)
    assert report.ok, report.first_fault
    assert any("compared as one; its parts are not" in note for note in report.notes) or (
        make is in_training and ctx.train
    )
    assert not fnbp.compare(make(layer, 1.1), normal(7, 5), ctx=ctx).ok


def test_the_largest_number_is_no_kink():
    report = fnbp.compare(
        lambda s: jnp.where(KEEP, s, jnp.finfo(jnp.float32).min),
        normal(5, 7),
        vjp=lambda a, d: (jnp.where(KEEP, d, 0),),
    )
    assert report.ok and not report.conventions


def test_layers_of_many_axes_and_of_none_are_tried_at_other_sizes():
    report = fnbp.compare(fnbp.conv(2, 3), normal(2, 3, 3, 3, 2), transforms=())
    assert report.ok and not any("IndexError" in note for note in report.notes)
    empty = fnbp.compare(fnbp.tanh(), normal(0, 3))
    assert not any("cannot be empty" in note for note in empty.notes)


def test_pairs_change_what_they_say():
    from fnbp.comparison.probes import pairs_of, probes_of
    from fnbp.comparison.subject import subject_of_layer

    layer, x = fnbp.dense(4), normal(7, 5)
    params, state = layer.init(jax.random.key(0), x)
    given = jax.tree.map(lambda a: np.asarray(a) + 1, (params, jnp.asarray(x)))
    subject = subject_of_layer("dense(4)", layer, given, (state, fnbp.Context()), None)
    wanted = ("given", "mirrored", "each_mirrored", "dy_ones", "prime_sizes")
    probes = [p for p in probes_of(subject, np.random.default_rng(0), wanted) if not isinstance(p, str)]
    pairs = list(pairs_of(subject, np.random.default_rng(0), probes))
    assert pairs and {pair.part.split(" of ")[-1] for pair in pairs if "params" in pair.part}
    for pair in pairs:
        if "params" in pair.part:
            same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (pair.args[0], params)), strict=True)]
            moved = [
                not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (pair.args[0], given[0])), strict=True)
            ]
            assert any(moved), pair.title
            assert not all(same)
        assert "sizes" not in pair.part


def test_a_loss_is_not_scaled_in_half_precision():
    """At 1e-7 the slope 1 / y_hat of a loss overflows float16, as autodiff's does."""
    p = np.random.default_rng(0).uniform(0.1, 0.9, (7, 11)).astype(np.float16)
    y = np.random.default_rng(1).uniform(0, 1, (7, 11)).astype(np.float16)
    assert fnbp.compare(fnbp.identity(), p, loss=fnbp.binary_cross_entropy(), y=y).ok


def test_a_masked_scan_refuses_a_cell_that_mixes_the_examples():
    def cell_of(layer):
        def forward(params, state, x, ctx):
            y, state, res = layer.forward(params, state, x[1] if x[0] is None else x[0] + x[1], ctx)
            return (y, y), state, res

        def backward(params, res, dy):
            factors, dx = layer.backward(params, res, dy[0] + dy[1])
            return factors, (dx, dx)

        return fnbp.Layer(
            lambda key, x: layer.init(key, x[1]), forward, backward, "cell", traits=fnbp.Traits(mixes="training")
        )

    net, x = fnbp.scan(cell_of(fnbp.batch_norm())), jnp.asarray(normal(5, 3, 2))
    params, state = net.init(jax.random.key(0), x)
    mask = jnp.ones((5, 3), bool)
    net.forward(params, state, x, TRAIN)
    with pytest.raises(TypeError, match="mixes the examples, also those that the mask leaves out"):
        net.forward(params, state, x, fnbp.Context(jax.random.key(1), mask, train=True))
