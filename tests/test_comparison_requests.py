"""What compare can be asked for: a level, sizes, a name, a limit, the cost, and more derivatives of a rule."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from fnbp.comparison.probes import LEVELS, PROBES

X = np.random.default_rng(0).standard_normal((7, 11)).astype(np.float32)


def sine_backward(args, dy):
    return (dy * jnp.cos(args[0]),)


def test_levels_grow():
    quick, full, deep = (LEVELS[name] for name in ("quick", "full", "deep"))
    assert set(quick) < set(full) == set(deep) == set(PROBES) and len(quick) < len(full) < len(deep)
    assert quick[0] == full[0] == deep[0] == "given"


def test_a_quick_comparison_calls_less_and_still_finds_a_wrong_formula():
    quick, full = (fnbp.compare(jnp.sin, X, vjp=sine_backward, level=level) for level in ("quick", "full"))
    assert quick.ok and full.ok and 4 * quick.calls["manual"] < full.calls["manual"]
    assert not fnbp.compare(jnp.sin, X, vjp=lambda args, dy: (dy * (1 + 1e-6),), level="quick").ok


def test_a_quick_comparison_of_a_net_leaves_out_combinators_only_if_the_whole_pass_is_right():
    net = fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.dense(3))
    report = fnbp.compare(net, X, level="quick")
    assert report.ok and "serial" not in {row.path for row in report.rows}

    def halved(params, res, dy):
        factors, dx = net.backward(params, res, dy)
        return factors, dx / 2

    fault = fnbp.compare(
        fnbp.serial(fnbp.replace_functions(net, backward=halved), fnbp.dense(2)), X, level="quick"
    ).first_fault
    assert fault is not None and fault.leaf == "x"


def test_what_is_asked_for_at_the_quick_level_is_done():
    report = fnbp.compare(jnp.sin, X, vjp=sine_backward, level="quick", transforms=("vmap",))
    assert report.checks["vmap"] == "ok"


def test_an_unknown_level_and_a_limit_of_no_time_are_refused():
    with pytest.raises(ValueError, match=r"unknown level 'slow'; there are: quick, full, deep"):
        fnbp.compare(jnp.sin, X, vjp=sine_backward, level="slow")
    with pytest.raises(ValueError, match=r"limit must be above 0 seconds, or None for no limit, got int 0"):
        fnbp.compare(jnp.sin, X, vjp=sine_backward, limit=0)


def test_a_custom_vjp_is_compared_with_its_own_function_and_bears_the_name_it_is_given():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, dy: (2 * dy * jnp.cos(x),))
    fault = fnbp.compare(f, X, name="my sine", level="quick").first_fault
    assert (fault.path, fault.kind, fault.hint) == (
        "my sine",
        "formula",
        "it is 2 times the right value: a factor 2 too many",
    )


def test_a_function_says_that_sizes_were_not_tried_unless_it_is_told_how():
    told = fnbp.compare(jnp.sin, X, vjp=sine_backward, sizes=lambda n: (np.resize(X, (n, 11)),))
    assert not told.notes
    silent = fnbp.compare(jnp.sin, X, vjp=sine_backward, level="quick")
    assert silent.notes == ("sin: only the sizes that were given were tried; give sizes=lambda n: args of size n",)


def test_what_does_not_end_at_the_given_point_is_refused_and_elsewhere_noted():
    waiting = threading.Event()

    def endless(where):
        def f(x):
            def wait(a):
                if where(a):
                    waiting.wait(20)
                return a

            return x + 0 * jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x))

        return f

    options = {"vjp": lambda args, dy: (dy,), "transforms": (), "limit": 1.0}
    with pytest.raises(ValueError, match=r"at the given arguments: it did not end within 1 s"):
        fnbp.compare(endless(lambda a: True), X, **options)
    report = fnbp.compare(endless(lambda a: np.all(a < 0)), X, probes=("given", "another", "negative"), **options)
    assert report.ok and "not tried at 'negative', it did not end within 1 s" in " ".join(report.notes)
    waiting.set()


def test_probes_outside_of_a_domain_are_not_tried():
    def logarithm(x):
        return jnp.log(x)

    options = {"vjp": lambda args, dy: (dy / jnp.abs(args[0]),), "sizes": lambda n: (np.ones((n, 3), np.float32),)}
    report = fnbp.compare(logarithm, abs(X) + 0.1, domain=lambda x: np.all(x > 0), **options)
    assert report.ok and "probes that lie outside of its domain" in " ".join(report.notes)


@pytest.mark.slow
def test_a_deep_comparison_tries_probes_in_pairs():
    def wrong(args, dy):
        x, w = args
        both = jnp.all(x < 0) & jnp.all(w == 0)
        return dy * jnp.where(both, 1, w), dy * x

    options = {"vjp": wrong, "transforms": (), "sizes": lambda n: (np.ones((n, 3), np.float32),) * 2}
    assert fnbp.compare(lambda x, w: x * w, X, X + 1, **options).ok
    fault = fnbp.compare(lambda x, w: x * w, X, X + 1, level="deep", **options).first_fault
    assert fault.probe == "negative of x, each_zero of w"


def test_cost_is_in_the_table_and_in_json():
    report = fnbp.compare(jnp.sin, X, vjp=sine_backward, level="quick", cost=True)
    assert report.costs["sin"].time_ratio > 0 and "time" in str(report)
    assert report.to_dict()["costs"]["sin"]["memory_ratio"] is not None
    assert fnbp.compare(jnp.sin, X, vjp=sine_backward, level="quick").costs == {}


# --- more derivatives of a rule ---


def product_rule(backward):
    """x w, with that backward of (x, w, dy)."""
    f = jax.custom_vjp(lambda x, w: x * w)
    f.defvjp(lambda x, w: (x * w, (x, w)), lambda res, dy: backward(*res, dy))
    return f


def test_each_argument_is_differentiated_alone():
    f = product_rule(lambda x, w, dy: (dy * w, dy * x))
    right = fnbp.compare(f, X, X + 1, level="quick", transforms=("one_argument",))
    assert right.ok and right.checks["one_argument"] == "ok"

    made = jax.custom_vjp(lambda x, w: x * w)

    def forward(x, w):
        return x.value * w.value, (x.value, w.value, x.perturbed and w.perturbed)

    made.defvjp(forward, lambda res, dy: (dy * res[1] * (1 if res[2] else 2), dy * res[0]), symbolic_zeros=True)
    fault = fnbp.compare(made, X, X + 1, reference=lambda x, w: x * w).first_fault
    assert (fault.leaf, fault.kind) == ("x", "one_argument")


def test_a_custom_jvp_is_tried_forwards_too():
    def made(factor):
        f = jax.custom_jvp(lambda x, w: jnp.sin(x) * w)
        f.defjvp(lambda p, t: (jnp.sin(p[0]) * p[1], factor * jnp.cos(p[0]) * t[0] * p[1] + jnp.sin(p[0]) * t[1]))
        return f

    report = fnbp.compare(made(1), X, X + 1, level="quick", transforms=("forwards",))
    assert report.ok and report.checks["forwards"] == "ok"
    assert fnbp.compare(made(2), X, X + 1, level="quick", transforms=("forwards",)).checks["forwards"] == "WRONG"


def test_random_programs_show_what_one_vmap_does_not():
    def on_the_host(axes):
        def cosine(x, dy):
            if x.ndim > X.ndim + axes:
                raise ValueError("more axes than it knows")
            return np.cos(np.asarray(x)) * np.asarray(dy)

        def backward(args, dy):
            shape = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
            return (jax.pure_callback(cosine, shape, args[0], dy, vmap_method="broadcast_all"),)

        return fnbp.compare(jnp.sin, X, vjp=backward, level="quick", transforms=("jit", "vmap", "programs"))

    assert on_the_host(axes=9).checks == {"jit": "ok", "vmap": "ok", "programs": "ok"}
    fault = on_the_host(axes=1).first_fault
    assert fault.kind == "programs" and "under vmap of " in fault.hint and "more axes than it knows" in fault.hint


def test_a_deep_comparison_tries_random_programs_and_others_do_not():
    for level, tried in ("quick", False), ("full", False), ("deep", True):
        report = fnbp.compare(jnp.sin, X, vjp=sine_backward, level=level, probes=("given",))
        assert ("programs" in report.checks) is tried


def test_the_second_order_is_compared_on_request():
    def stopped(args, dy):
        return (dy * jnp.cos(jax.lax.stop_gradient(args[0])),)

    right = fnbp.compare(jnp.sin, X, vjp=sine_backward, level="quick", transforms=("second_order",))
    assert right.ok and right.checks["second_order"] == "ok"
    fault = fnbp.compare(jnp.sin, X, vjp=stopped, level="quick", transforms=("second_order",)).first_fault
    assert fault.kind == "second_order" and "jax.hvp" in fault.hint


def test_gradients_of_extreme_probes_are_not_kept(monkeypatch):
    from fnbp.comparison import evaluation

    evaluators = []
    real = evaluation.Evaluator.__init__

    def watched(self, *args, **options):
        evaluators.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(evaluation.Evaluator, "__init__", watched)
    assert fnbp.compare(jnp.sin, X, vjp=sine_backward).ok
    assert len(evaluators[0].known) <= 3 * 6  # the given point and draws around it, in up to three dtypes


# --- what a subject refuses ---


def test_a_point_that_a_function_refuses_is_no_fault_of_its_backward():
    def refuse(a):
        if np.any(a[0, 0] != X[0, 0]):
            raise ValueError("only this point")
        return a

    def picky(x):
        same = jax.pure_callback(refuse, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x))
        return jnp.sin(x) + 0 * same

    report = fnbp.compare(picky, X, vjp=sine_backward, probes=("given", "mirrored", "zeros"), transforms=())
    assert report.ok, report
    assert "picky: not tried at 'mirrored'" in " ".join(report.notes)


@pytest.mark.slow
def test_a_backward_that_needs_values_is_compared_example_by_example_too():
    dense = fnbp.dense(5)

    def needs_values(params, res, dy):
        assert float(dy[0, 0]) > -1e30
        return dense.backward(params, res, dy)

    def rolled(params, res, dy):
        factors, dx = needs_values(params, res, dy)
        return factors | {"b": fnbp.Sum(jnp.roll(factors["b"].d, 1, 0))}, dx

    right = fnbp.compare(fnbp.replace_functions(dense, backward=needs_values), X, transforms=())
    assert right.ok and right.checks["examples"] == "ok"
    wrong = fnbp.compare(fnbp.replace_functions(dense, backward=rolled), X, transforms=())
    assert [(row.leaf, row.kind) for row in wrong.faults] == [("b", "example")]


def test_a_value_that_differs_is_told_once():
    f = jax.custom_vjp(jnp.tanh)
    f.defvjp(lambda x: (jnp.tanh(x) * (1 + 1e-9), jnp.tanh(x)), lambda y, dy: (dy * (1 - y**2),))
    assert [row.kind for row in fnbp.compare(f, X).faults] == ["forward"]


def test_arguments_outside_of_the_domain_are_refused():
    with pytest.raises(ValueError, match=r"compare: the arguments of sin lie outside of its domain"):
        fnbp.compare(jnp.sin, X, vjp=sine_backward, domain=lambda x: np.all(x > 0))


def test_the_mesh_of_the_caller_holds_within_the_limit():
    mesh = jax.make_mesh((1,), ("d",))
    with jax.set_mesh(mesh):
        from fnbp.comparison.evaluation import within

        assert within(5, jax.sharding.get_mesh) == mesh
