"""compare at the edges: right backwards that look wrong, wrong ones that hide, options of other kinds, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from fnbp.comparison.probe import Probe
from fnbp.comparison.probes import probes_of
from fnbp.comparison.subject import subject_of_layer
from fnbp.layer import Static

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)


def sine_backward(args, dy):
    return (dy * jnp.cos(args[0]),)


def grown(n):
    return (np.resize(X, (n, 3)),)


# --- right ones ---

KINKS_THAT_CANCEL = {
    "softplus": (lambda x: jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-abs(x))), lambda a, dy: (dy * jax.nn.sigmoid(a[0]),)),
    "relu - relu": (lambda x: jax.nn.relu(x) - jax.nn.relu(-x), lambda a, dy: (dy,)),
    "i0": (jax.scipy.special.i0, lambda a, dy: (dy * jax.scipy.special.i1(a[0]),)),
}


@pytest.mark.parametrize("name", KINKS_THAT_CANCEL)
def test_autodiff_is_outvoted_where_kinks_of_its_parts_cancel(name):
    f, backward = KINKS_THAT_CANCEL[name]
    report = fnbp.compare(f, X, vjp=backward)
    told = any("differences of the forward agree with it" in row.hint for row in report.conventions)
    right = np.allclose(jax.vjp(f, np.zeros_like(X))[1](X)[0], backward((np.zeros_like(X),), X)[0])  # in newer versions
    assert report.ok and told != right
    assert not fnbp.compare(f, X, vjp=lambda a, dy: (jnp.where(a[0] == 0, 3 * dy, backward(a, dy)[0]),)).ok


ZEROS = np.maximum(X, 0)  # as after a relu


def test_a_kink_that_cancels_may_be_given():
    f, backward = KINKS_THAT_CANCEL["softplus"]
    for x in (ZEROS, ZEROS.astype(np.float16), X.astype(np.float16)):
        assert fnbp.compare(f, x, vjp=backward).ok
    assert not fnbp.compare(f, ZEROS, vjp=lambda a, dy: (jnp.where(a[0] == 0, 3 * dy, backward(a, dy)[0]),)).ok
    stopped = fnbp.compare(lambda x: x * jax.lax.stop_gradient(x), X, vjp=lambda a, dy: (2 * a[0] * dy,))
    assert stopped.first_fault.kind == "formula" and "ignores a stop_gradient" in stopped.first_fault.hint


def softmax_in_float32(x):
    return jax.nn.softmax(x.astype(jnp.float32), -1).astype(x.dtype)


def softmax_in_float32_backward(args, dy):
    p, dy = (a.astype(jnp.float32) for a in (softmax_in_float32(args[0].astype(jnp.float32)), dy))
    return ((p * (dy - jnp.sum(p * dy, -1, keepdims=True))).astype(args[0].dtype),)


def square_backward(factor):
    return lambda args, dy: ((factor * args[0] * dy).astype(jnp.bfloat16),)


def test_half_precision_around_float32_and_at_the_end_of_a_backward():
    x = jnp.asarray(X, jnp.bfloat16)
    assert fnbp.compare(softmax_in_float32, x, vjp=softmax_in_float32_backward).ok
    assert fnbp.compare(jnp.square, x, vjp=square_backward(2.0)).ok
    fault = fnbp.compare(jnp.square, x, vjp=square_backward(2.1)).first_fault
    assert fault.kind == "formula" and "linear" not in fault.hint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_formulas_that_cancel_in_small_elements_are_not_accused(dtype):
    def gelu_backward(args, dy):
        (x,) = args
        return (dy * (0.5 * (1 + jax.lax.erf(x * 2**-0.5)) + x * jnp.exp(-(x**2) / 2) * (2 * np.pi) ** -0.5),)

    for x in (X, 3 * X):
        report = fnbp.compare(lambda x: jax.nn.gelu(x, approximate=False), jnp.asarray(x, dtype), vjp=gelu_backward)
        assert report.ok, report


def test_a_steep_slope_within_a_step_of_the_differences_is_no_fault():
    def unit(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def backward(args, dy):
        n = jnp.linalg.norm(args[0], axis=1, keepdims=True)
        m = jnp.maximum(n, 1e-12)
        y = args[0] / m
        return (jnp.where(n > 1e-12, (dy - y * jnp.sum(y * dy, 1, keepdims=True)) / m, dy / m),)

    assert fnbp.compare(unit, X, vjp=backward).ok


def test_softmax_saturated_beside_rows_that_are_not():
    net = fnbp.serial(fnbp.dense(11), fnbp.softmax())
    x = jnp.asarray(np.random.default_rng(82).standard_normal((2, 5)), jnp.float32)
    params, state = net.init(jax.random.key(82), x)

    def plain(params, x):
        return fnbp.apply(net, params, state, x)

    options = {"probes": ("given", "each_large"), "key": jax.random.key(82)}
    report = fnbp.compare(fnbp.to_jax(net), params, x, reference=plain, **options)
    assert report.ok, report


@pytest.mark.parametrize("net", [fnbp.dense(3), fnbp.layer_norm()], ids=lambda net: net.name)
@pytest.mark.parametrize("x", [X[0], X[:0]], ids=["one example without its axis", "no example"])
def test_a_layer_without_a_batch_is_not_tried_by_example(net, x):
    report = fnbp.compare(net, x)
    assert report.ok and report.checks.get("examples", "").startswith("not tried")


def test_a_constant_of_float32_in_the_forward_is_judged_in_float32():
    report = fnbp.compare(lambda x: x * jnp.float32(0.1), X, vjp=lambda a, dy: (dy * 0.1,), name="f")
    assert (
        report.ok and "f: judged in float32, where small mistakes hide: it holds a constant of float32" in report.notes
    )
    assert not fnbp.compare(lambda x: x * jnp.float32(0.1), X, vjp=lambda a, dy: (dy * 0.10001,)).ok
    assert not fnbp.compare(lambda x: x * 0.1, X, vjp=lambda a, dy: (dy * jnp.float32(0.1),)).ok


def test_batch_norm_is_compared_without_more():
    for net in (fnbp.batch_norm(), fnbp.serial(fnbp.dense(5), fnbp.batch_norm(), fnbp.dense(3))):
        assert fnbp.compare(net, X).ok


def test_several_outputs_of_which_one_is_tiny_are_judged_and_say_nothing():
    def two(x):
        return jnp.sin(x), jnp.cos(x)

    report = fnbp.compare(two, X, vjp=lambda a, dy: (dy[0] * jnp.cos(a[0]) - dy[1] * jnp.sin(a[0]),))
    assert report.ok and not report.conventions


def test_a_cast_is_not_taken_for_a_stop_gradient():
    report = fnbp.compare(fnbp.serial(fnbp.cast(fnbp.dense(4), "bfloat16"), fnbp.dense(2)), X)
    assert report.ok and not report.conventions and report.checks["differences"] == "ok"


@pytest.mark.parametrize("shape", [(0,), (0, 3)], ids=str)
def test_nothing_is_compared_without_a_word(shape):
    report = fnbp.compare(
        jnp.sin, np.zeros(shape, np.float32), vjp=sine_backward, sizes=lambda n: (np.ones((n, 3), "f"),)
    )
    assert report.ok and not report.notes


# --- wrong ones ---

HIDDEN = {
    "the power is taken for 3": (lambda x, n: x * n, lambda a, dy: (dy * 3, None), (X, np.int32(3))),
    "a loss clips large cotangents": (lambda x: (x * x).sum(), lambda a, dy: (2 * a[0] * jnp.minimum(dy, 1e3),), (X,)),
    "all dy negative": (jnp.sin, lambda a, dy: (dy * jnp.cos(a[0]) * jnp.where(jnp.all(dy < 0), 2, 1),), (X,)),
    "0 if the first of two outputs is not asked for": (
        lambda x: (jnp.sin(x), jnp.cos(x)),
        lambda a, dy: (jnp.where(jnp.all(dy[0] == 0), 0, dy[0] * jnp.cos(a[0]) - dy[1] * jnp.sin(a[0])),),
        (X,),
    ),
    "a number that is closed over": (
        jnp.sin,
        lambda a, dy: (dy * jnp.cos(a[0]) * jnp.where(abs(a[0] - jnp.asarray([311.0, 2.5, 7.5])) < 0.01, 2, 1),),
        (X,),
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_mistake_is_found(name):
    f, backward, args = HIDDEN[name]
    assert not fnbp.compare(f, *args, vjp=backward).ok


def test_who_says_how_to_make_other_sizes_has_them_tried_at_every_level():
    def mean_backward(args, dy):
        return (jnp.broadcast_to(dy / 4, args[0].shape),)

    assert not fnbp.compare(lambda x: x.mean(0), X, vjp=mean_backward, sizes=grown, level="quick").ok
    of_seven = lambda a, dy: (dy * jnp.cos(a[0]) * (2 if len(a[0]) % 8 == 7 else 1),)  # noqa: E731
    assert not fnbp.compare(jnp.sin, X, vjp=of_seven, sizes=grown).ok


def test_the_second_order_is_taken_in_the_cotangent_too():
    def stopped(args, dy):
        return (jax.lax.stop_gradient(dy) * jnp.cos(args[0]),)

    fault = fnbp.compare(jnp.sin, X, vjp=stopped, level="quick", transforms=("second_order",)).first_fault
    assert fault.kind == "second_order"


# --- options, and what is said of them ---

BAD = {
    "a domain that raises": ({"domain": lambda x: jnp.al(x)}, AttributeError, "no attribute 'al'"),
    "a domain of arrays": (
        {"domain": lambda x: x > -9},
        TypeError,
        r"domain must return True or False, got bool of shape \(4, 3\)",
    ),
    "a domain of text": ({"domain": lambda x: "no"}, TypeError, "domain must return True or False, got str 'no'"),
    "no domain": ({"domain": True}, TypeError, "domain must be a function, args -> True or False, got bool True"),
    "no sizes": ({"sizes": 3}, TypeError, "sizes must be a function, n -> the arguments at size n, got int 3"),
    "sizes of an array": (
        {"sizes": lambda n: np.ones((n, 3))},
        TypeError,
        "sizes must return a tuple of the 1 arguments of sin",
    ),
    "sizes too many": ({"sizes": lambda n: (X, X)}, TypeError, "a tuple of the 1 arguments of sin, got 2 of them"),
    "a limit of text": ({"limit": "1"}, ValueError, "limit must be above 0 seconds, or None for no limit, got str '1'"),
    "a limit of True": ({"limit": True}, ValueError, "limit must be above 0 seconds"),
    "probes of text": ({"probes": "given"}, TypeError, "probes must be a tuple of names, got str 'given'"),
    "probes of a list": ({"probes": ("given", ["zeros"])}, ValueError, "unknown probe"),
    "transforms of text": ({"transforms": "jit"}, TypeError, "transforms must be a tuple of names, got str 'jit'"),
    "a level of a list": ({"level": ["full"]}, ValueError, "unknown level"),
    "both": ({"reference": jnp.sin}, TypeError, "sin is given reference= and vjp=; give one of the two"),
    "a name of 3": ({"name": 3}, TypeError, "name must be"),
    "a context": ({"ctx": fnbp.Context(train=True)}, TypeError, "ctx= goes with a Layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_option_of_another_kind_is_refused(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fnbp.compare(jnp.sin, X, **{"vjp": sine_backward} | options)


def test_other_refusals():
    with pytest.raises(TypeError, match="vjp must be a function, got int 3"):
        fnbp.compare(jnp.sin, X, vjp=3)
    with pytest.raises(TypeError, match="compare: ctx must be"):
        fnbp.compare(fnbp.dense(3), X, ctx=3)
    power = jax.custom_vjp(lambda x, n: x**n, nondiff_argnums=(1,))
    power.defvjp(lambda x, n: (x**n, x), lambda n, x, dy: (n * dy * x ** (n - 1),))
    with pytest.raises(TypeError, match="has nondiff_argnums: close over those arguments"):
        fnbp.compare(power, X, 3)
    with pytest.raises(ValueError, match="what sin is given has 12 non-finite"):
        fnbp.compare(jnp.sin, X * np.nan, vjp=sine_backward)
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        fnbp.compare(lambda x, m: 2 * x if m else x, X, np.bool_(True), vjp=lambda a, dy: (2 * dy, None), name="f")
    assert any("compare: f was called with" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("limit", [float("inf"), 1e12, 10**7])
def test_a_limit_longer_than_any_is_none(limit):
    assert fnbp.compare(jnp.sin, X, vjp=sine_backward, level="quick", limit=limit).ok


def test_a_mode_that_only_the_backward_sees_is_tried():
    plain = fnbp.sigmoid()

    def forward(params, state, x, ctx):
        y, state, res = plain.forward(params, state, x, ctx)
        return y, state, (res, Static(ctx.train))

    def backward(params, res, dy):
        factors, dx = plain.backward(params, res[0], dy)
        return factors, 2 * dx if res[1].value else dx

    fault = fnbp.compare(fnbp.replace_functions(plain, forward=forward, backward=backward), X).first_fault
    assert fault.probe == "other_mode" and "factor 2" in fault.hint


def test_another_mode_is_tried_only_where_something_differs():
    def tried(layer):
        x = jnp.asarray(X)
        params, state = layer.init(jax.random.key(0), x)
        subject = subject_of_layer(layer.name, layer, (params, x), (state, fnbp.Context()))
        points = probes_of(subject, np.random.default_rng(0), ("given", "other_mode"))

        return [point.name for point in points if isinstance(point, Probe)]

    assert tried(fnbp.dense(3)) == tried(fnbp.relu()) == ["given"]
    assert tried(fnbp.dropout(0.5)) == tried(fnbp.batch_norm()) == ["given", "other_mode"]


def test_functions_are_given_arrays_of_jax():
    @jax.custom_vjp
    def first_doubled(x):
        return x.at[0].multiply(2)

    first_doubled.defvjp(lambda x: (first_doubled(x), None), lambda _, dy: (dy.at[0].multiply(2),))
    assert fnbp.compare(first_doubled, X, reference=lambda x: x.at[0].multiply(2)).ok


def test_outputs_that_are_no_arrays_of_numbers_do_not_hinder():
    def backward(args, dy):
        return (2 * args[0] * dy[0],)

    assert fnbp.compare(lambda x: (x**2, jax.random.key(0)), X, vjp=backward).ok
    assert fnbp.compare(lambda x: (x**2, 1.0), X, vjp=backward).ok


def test_numbers_beyond_float32_and_sizes_of_another_kind_are_named():
    def backward(args, dy):
        return (2 * args[0] * dy,)

    with pytest.raises(ValueError, match=r"what square is given has numbers beyond float32, and jax_enable_x64 is off"):
        fnbp.compare(jnp.square, np.full((3, 3), 1e300), vjp=backward, name="square")
    with pytest.raises(TypeError, match=r"argument 0 of square is float32 .*, but sizes\(2\) returns int64"):
        fnbp.compare(jnp.square, X, vjp=backward, name="square", sizes=lambda n: (np.ones((n, 3), int),))


def test_a_random_key_among_the_arguments_loses_no_probe():
    def f(x, key):
        return x * jax.random.bernoulli(key, 0.5, x.shape)

    report = fnbp.compare(f, X, jax.random.key(0), vjp=lambda a, dy: (f(dy, a[1]), None))
    assert report.ok and not any("not tried at" in note for note in report.notes)
