"""compare on anyone's functions: a custom_vjp beside a plain twin, and a function with its backward written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
import fnbp.testing

rng = np.random.default_rng(0)
X = rng.standard_normal((7, 11)).astype(np.float32)
W = rng.standard_normal((5, 11)).astype(np.float32)


def plain(x):
    return jnp.tanh(x)


def custom(backward, forward=plain):
    """A jax.custom_vjp of tanh with that backward of (y, dy)."""
    made = jax.custom_vjp(forward)
    made.defvjp(lambda x: (forward(x), forward(x)), lambda y, dy: (backward(y, dy),))
    return made


def slope(y, dy):
    return dy * (1 - y**2)


def test_a_right_custom_vjp_is_ok():
    report = fnbp.compare(custom(slope), X, reference=plain)
    assert report.ok and [(row.path, row.leaf, row.kind) for row in report.rows] == [("plain", "x", "ok")]
    assert report.checks["jit"] == report.checks["vmap"] == "ok" and report.checks["sharded"].startswith("not tried")


def test_a_wrong_custom_vjp_is_named_with_its_values():
    report = fnbp.compare(custom(lambda y, dy: dy * (1 - y)), X, reference=plain)
    fault = report.first_fault
    assert (fault.path, fault.leaf, fault.kind, fault.probe) == ("plain", "x", "formula", "given")
    assert fault.shape == X.shape and fault.manual != fault.automatic and fault.whole is None


def test_a_reference_that_is_another_function_is_said_to_be():
    fault = fnbp.compare(custom(slope), X, reference=lambda x: jnp.tanh(2 * x)).first_fault
    assert (fault.kind, fault.leaf) == ("forward", "y") and "a different function" in fault.hint


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"compare: plain returns float32\[7, 11\], its reference float32\[7\]"):
        fnbp.compare(custom(slope), X, reference=lambda x: jnp.tanh(x).sum(1))


def affine(params, x):
    return x @ params["W"].T + params["b"]


def affine_backward(args, dy):
    params, x = args
    return {"W": dy.T @ x, "b": dy.sum(0)}, dy @ params["W"]


PARAMS = {"W": W, "b": np.ones(5, np.float32)}


def test_leaves_of_a_function_bear_the_names_of_its_arguments():
    report = fnbp.testing.assert_gradients_match(affine, PARAMS, X, vjp=affine_backward)
    assert [(row.leaf, row.shape) for row in report.rows] == [("params.W", (5, 11)), ("params.b", (5,)), ("x", (7, 11))]


def test_the_culprit_of_a_function_is_an_argument():
    def swapped(args, dy):
        dparams, dx = affine_backward(args, dy)
        return {"W": dparams["W"] / len(dx), "b": dparams["b"]}, dx

    report = fnbp.compare(affine, PARAMS, X, vjp=swapped)
    assert [(row.leaf, row.hint) for row in report.faults] == [
        ("params.W", "it is 0.142857 times the right value: divided by 7, the batch size: a mean instead of a sum")
    ]


def test_outputs_of_other_scales_do_not_hide_one_another():
    def two(x):
        return 1e8 * x.sum(0), jnp.sin(x)

    def backward(args, dy):
        (x,) = args
        return (1e8 * dy[0] + jnp.cos(x) * dy[1] * (1 + 1e-4),)

    report = fnbp.compare(two, X, vjp=backward)
    assert [row.kind for row in report.faults] == ["formula"]
    right = fnbp.compare(two, X, vjp=lambda args, dy: (1e8 * dy[0] + jnp.cos(args[0]) * dy[1],))
    assert right.ok


def test_integers_and_none_among_arguments_and_cotangents():
    def power(x, n, scale):
        return scale * x**n

    def backward(args, dy):
        x, n, scale = args
        return dy * scale * n * x ** (n - 1), None, jnp.sum(dy * x**n)

    report = fnbp.compare(power, X, jnp.int32(3), jnp.float32(1.5), vjp=backward)
    assert report.ok and [row.leaf for row in report.rows] == ["x", "scale"]

    def forgets(args, dy):
        dx, dn, _ = backward(args, dy)
        return dx, dn, None

    fault = fnbp.compare(power, X, jnp.int32(3), jnp.float32(1.5), vjp=forgets).first_fault
    assert (fault.leaf, fault.hint) == ("scale", "it is all zero: the gradient is dropped")


STRUCTURES = {
    "no_tuple": (lambda args, dy: dy, "x", "got an array, expected a tuple of 1"),
    "too_many": (lambda args, dy: (dy, dy), "x", "got a tuple of 2, expected a tuple of 1"),
    "a_tree": (lambda args, dy: ({"x": dy},), "x", "got dict, expected float32[7, 11]"),
    "keepdims": (lambda args, dy: (dy[None],), "x", "got float32[1, 7, 11], expected float32[7, 11]"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_cotangents_of_another_build_are_named(name):
    vjp, leaf, hint = STRUCTURES[name]
    fault = fnbp.compare(plain, X, vjp=vjp).first_fault
    assert (fault.leaf, fault.kind, fault.hint) == (leaf, "structure", hint)


# --- conventions, and rules of autodiff's own ---


def at_zero(slope):
    """relu's backward with that slope at 0."""
    return lambda args, dy: (jnp.where(args[0] > 0, dy, jnp.where(args[0] == 0, slope * dy, 0)),)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_a_slope_between_those_of_a_kink_is_a_convention(slope):
    report = fnbp.compare(jax.nn.relu, X, vjp=at_zero(slope))
    assert report.ok
    assert [row.probe for row in report.conventions] == ([] if slope == 0 else ["zeros"])
    assert all("kink or a tie" in row.hint for row in report.conventions)


@pytest.mark.parametrize("slope", [-0.5, 1.5])
def test_a_slope_beyond_those_of_a_kink_is_a_fault(slope):
    fault = fnbp.compare(jax.nn.relu, X, vjp=at_zero(slope)).first_fault
    assert (fault.kind, fault.probe) == ("formula", "zeros")


def test_a_fault_of_a_billionth_is_not_taken_for_a_kink():
    report = fnbp.compare(custom(lambda y, dy: slope(y, dy) * (1 + 1e-10)), X, reference=plain)
    assert [row.kind for row in report.faults] == ["formula"] and not report.conventions


def test_ties_of_a_maximum_may_be_shared_out_in_any_way_but_not_lost():
    def largest(x):
        return x.max(1)

    def first(args, dy):
        (x,) = args
        return (dy[:, None] * jax.nn.one_hot(x.argmax(1), x.shape[1], dtype=x.dtype),)

    def all_of_them(args, dy):
        (x,) = args
        return (dy[:, None] * (x == x.max(1, keepdims=True)),)

    def lost(args, dy):
        (x,) = args
        ties = x == x.max(1, keepdims=True)
        return (dy[:, None] * ties * (ties.sum(1, keepdims=True) == 1),)

    report = fnbp.compare(largest, X, vjp=first)
    assert report.ok and report.conventions
    for vjp in (all_of_them, lost):  # its parts must sum to dy
        fault = fnbp.compare(largest, X, vjp=vjp).first_fault
        assert fault.kind == "formula" and fault.probe in ("ties", "all_zero")


def stopped(x):
    return x * jax.lax.stop_gradient(jnp.sin(x))


def overlapping_maxima(x):
    return jnp.maximum(jnp.maximum(x[:, :-2], x[:, 1:-1]), x[:, 2:])


def first_takes_all(factor):
    def backward(args, dy):
        (x,) = args
        windows = jnp.stack([x[:, :-2], x[:, 1:-1], x[:, 2:]])
        parts = factor * dy * (jnp.argmax(windows, 0) == jnp.arange(3)[:, None, None])
        return (sum(jnp.pad(part, ((0, 0), (k, 2 - k))) for k, part in enumerate(parts)),)

    return backward


def test_a_number_that_stands_in_several_ties_may_be_given_any_of_their_shares():
    report = fnbp.compare(overlapping_maxima, X, vjp=first_takes_all(1))
    assert report.ok and "at a kink or a tie" in report.conventions[0].hint
    assert not fnbp.compare(overlapping_maxima, X, vjp=first_takes_all(1.001)).ok


def test_a_stop_gradient_that_the_backward_keeps_is_a_convention():
    report = fnbp.compare(stopped, X, vjp=lambda args, dy: (dy * jnp.sin(args[0]),))
    assert report.ok
    (row,) = report.conventions
    assert report.checks["differences"] == "not autodiff's"
    assert "differences of the forward give another slope than autodiff (Taylor order 1.0, expected 2)" in row.hint


def test_a_stop_gradient_that_the_backward_goes_through_is_a_fault():
    def leak(args, dy):
        (x,) = args
        return (dy * (jnp.sin(x) + x * jnp.cos(x)),)

    fault = fnbp.compare(stopped, X, vjp=leak).first_fault
    assert fault.kind == "formula" and "differences of the forward agree with it, not with autodiff" in fault.hint


def test_a_wrong_rule_in_the_forward_itself_is_seen():
    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    sine.defjvps(lambda dx, y, x: 2 * jnp.cos(x) * dx)
    fault = fnbp.compare(sine, X, vjp=lambda args, dy: (2 * jnp.cos(args[0]) * dy,)).first_fault
    assert fault.kind == "disputed" and "another slope than autodiff" in fault.hint


# --- precision ---


def test_a_backward_that_cancels_is_less_precise_not_wrong():
    def third(x):
        return x**3 / 3

    def cancelling(args, dy):
        (x,) = args
        return (dy * ((x + 300) ** 2 - 600 * x - 9e4),)

    fault = fnbp.compare(third, X, vjp=cancelling).first_fault
    assert fault.kind == "precision" and fault.rho > 100
    assert fnbp.compare(third, X, vjp=lambda args, dy: (dy * args[0] ** 2,)).ok


def test_a_backward_that_overflows_where_autodiff_does_not_is_not_finite():
    def softplus(x):
        return jnp.logaddexp(x, 0.0)

    fault = fnbp.compare(
        softplus, X, vjp=lambda args, dy: (dy * jnp.exp(args[0]) / (1 + jnp.exp(args[0])),)
    ).first_fault
    assert (fault.kind, fault.probe) == ("nonfinite", "large")
    assert "in float32, where float64 and autodiff are finite" in fault.hint


def test_bfloat16_beside_an_autodiff_that_is_wide_inside_is_no_fault():
    def sum_of_squares(x):
        return jnp.sum(x.astype(jnp.float32) ** 2, 0).astype(x.dtype) if x.dtype == jnp.bfloat16 else jnp.sum(x**2, 0)

    report = fnbp.compare(sum_of_squares, jnp.asarray(X, jnp.bfloat16), vjp=lambda args, dy: (2 * args[0] * dy,))
    assert report.ok and report.rows[0].dtype == "bfloat16"


# --- float64 ---


def only_float32(x):
    if x.dtype == jnp.float64:
        raise TypeError("this kernel takes float32")
    return jnp.exp(x)


def test_without_float64_it_says_so_and_judges_in_float32():
    report = fnbp.compare(only_float32, X, vjp=lambda args, dy: (dy * jnp.exp(args[0]),))
    assert report.ok
    assert (
        "judged in float32, where small mistakes hide: in float64 it raises TypeError: this kernel takes"
        in report.notes[0]
    )
    bad = fnbp.compare(only_float32, X, vjp=lambda args, dy: (1.001 * dy * jnp.exp(args[0]),))
    assert bad.first_fault.hint == "it is 1.001 times the right value"


def test_a_forward_that_casts_to_float32_is_judged_as_float32():
    def narrow(x):
        return jnp.exp(x.astype(jnp.float32)).astype(x.dtype)

    def backward(args, dy):
        y = jnp.exp(args[0].astype(jnp.float32) / 3) ** 3
        return ((dy.astype(jnp.float32) * y).astype(dy.dtype),)

    report = fnbp.compare(narrow, X, vjp=backward)
    assert report.ok and "it computes in float32 whatever comes in" in " ".join(report.notes)
    fault = fnbp.compare(narrow, X, vjp=lambda args, dy: (1.0001 * backward(args, dy)[0],)).first_fault
    assert fault.kind == "formula"


# --- bad input ---


BAD = {
    "no_backward": (
        lambda: fnbp.compare(plain, X),
        TypeError,
        "plain has no backward to compare: give reference=plain",
    ),
    "two_backwards": (lambda: fnbp.compare(plain, X, vjp=plain, reference=plain), TypeError, "one of the two"),
    "integers": (
        lambda: fnbp.compare(plain, jnp.arange(3), vjp=plain),
        ValueError,
        "plain has no floating point argument to differentiate, got int32 of shape",
    ),
    "no_arguments": (
        lambda: fnbp.compare(plain, vjp=plain),
        ValueError,
        "no floating point argument to differentiate, got none",
    ),
    "text": (
        lambda: fnbp.compare(plain, "x", vjp=plain),
        TypeError,
        "leaf 0 of the arguments of plain is str 'x': close over",
    ),
    "a_list": (
        lambda: fnbp.compare(plain, [1.0, 2.0], vjp=plain),
        TypeError,
        "plain is given a list of numbers; give an array",
    ),
    "nan_in": (
        lambda: fnbp.compare(plain, X * np.nan, vjp=plain),
        ValueError,
        "what plain is given has 77 non-finite",
    ),
    "nan_out": (
        lambda: fnbp.compare(jnp.log, X, vjp=lambda args, dy: (dy / args[0],)),
        ValueError,
        "returns values that are not finite at the given arguments",
    ),
    "random": (
        lambda: fnbp.compare(lambda x: x * rng.random(), X, vjp=lambda args, dy: (dy,)),
        ValueError,
        "is random: called twice on the same arguments .* give it its randomness as an argument",
    ),
    "while_loop": (
        lambda: fnbp.compare(
            lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x), X, vjp=lambda args, dy: (dy,)
        ),
        TypeError,
        "jax.vjp cannot differentiate <lambda>, so there is nothing to compare with: Reverse-mode",
    ),
    "integer_out": (
        lambda: fnbp.compare(lambda x: jnp.argmax(x), X, vjp=lambda args, dy: (dy,)),
        TypeError,
        "must return a floating point array to be differentiated, got int32",
    ),
    "params_too": (lambda: fnbp.compare(plain, X, vjp=plain, params={}), TypeError, "params= goes with a Layer"),
    "a_class": (
        lambda: fnbp.compare(dict, X, vjp=plain),
        TypeError,
        "subject must be a Layer or a function, got type dict",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    run, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run()
    assert not jax.config.jax_enable_x64


# --- devices ---


def test_a_missing_sum_over_devices_is_seen():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    x = rng.standard_normal((8, 3)).astype(np.float32)

    def scaled_sum(w, x):
        def local(w, x):
            return jax.lax.psum(jnp.sum(w * x, 0), "d")

        return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=False)(w, x)

    def backward(whole):
        def of(args, dy):
            def local(w, x, dy):
                dw = jnp.sum(x, 0) * dy
                return jax.lax.psum(dw, "d") if whole else dw, w * dy * jnp.ones_like(x)

            specs = {"in_specs": (P(), P("d"), P()), "out_specs": (P(), P("d"))}
            return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(*args, dy)

        return of

    w = np.ones(3, np.float32)
    probes = {"probes": ("given", "another", "nearby")}
    assert fnbp.compare(scaled_sum, w, x, vjp=backward(True), transforms=("jit",), **probes).ok
    faults = fnbp.compare(scaled_sum, w, x, vjp=backward(False), transforms=("jit",), **probes).faults
    assert [(row.leaf, row.kind) for row in faults] == [("w", "formula")]
