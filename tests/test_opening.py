"""fnbp.opened: the gradient of each example of any loss is that of JAX, and so is what a contraction makes of it."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
from tests.opening_case import DENSE, TWO, M, dense, drawn, energy, np_rng
from tests.opening_cases import CASES

REFUSED = (TypeError, ValueError)
BY_ID = {case.id: case for case in CASES}
OPEN = [case for case in CASES if not case.refused]
QUICK = [case for case in OPEN if case.quick]


def named(cases, quickly=lambda case: True):
    """One parameter of a test for each case."""
    return [pytest.param(case, id=case.id, marks=[pytest.mark.slow] * (not quickly(case))) for case in cases]


def is_free(leaf):
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)


@functools.cache
def prepared(id):
    """loss, params, batch, and by JAX: the values, and the gradients of each example, of the inexact leaves."""
    case = BY_ID[id]
    loss, params, batch = case.make()
    leaves, tree = jax.tree.flatten(params)

    def own(free, *example):
        free = iter(free)
        return loss(tree.unflatten([next(free) if is_free(leaf) else leaf for leaf in leaves]), *example)

    axes = (None, *(None if i in case.shared else 0 for i in range(1, len(batch) + 1)))
    by_jax = jax.jit(jax.vmap(jax.value_and_grad(own, has_aux=case.has_aux), axes))
    values, grads = by_jax([leaf for leaf in leaves if is_free(leaf)], *batch)
    return loss, params, batch, values, grads


def opened(case, loss, contract):
    return fnbp.opened(loss, contract=contract, shared=case.shared, has_aux=case.has_aux)


def says(error, words):
    return all(re.search(word, str(error), re.I) for word in words)


def pairs(params, grads):
    """(path, made) of each inexact leaf."""
    paths = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    each = jax.tree.structure(params).flatten_up_to(grads)
    return [(path, value) for (path, leaf), value in zip(paths, each, strict=True) if is_free(leaf)]


def check(found, due, tolerance, floor=0.0, name="losses"):
    """found is due, up to tolerance of its largest entry, and what is not finite lies in the same places."""
    found, due = (np.asarray(a, complex if jnp.iscomplexobj(a) else float) for a in (found, due))
    assert found.shape == due.shape, f"{name}: expected the shape {due.shape}, got {found.shape}"
    assert np.array_equal(np.isnan(found), np.isnan(due)), f"{name}: NaN at other places"
    finite = np.isfinite(due)
    np.testing.assert_array_equal(found[~finite], due[~finite], name)
    scale = max(np.max(np.abs(due[finite]), initial=np.finfo(float).tiny), floor)
    error = np.max(np.abs(found[finite] - due[finite]), initial=0) / scale
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check_all(found, due, tolerance, floor):
    assert len(found) == len(due)
    for (path, value), row in zip(found, due, strict=True):
        check(value, row, tolerance, floor, path)


# --- every contraction ---


def flat(g):
    return g.reshape(len(g), -1)


DUE = {  # (direction, kept) -> contraction; what is due, of gradients g, the direction v, and gradients h of a batch
    "per_example": (lambda v, kept: fnbp.per_example, lambda g, v, h: g),
    "total": (lambda v, kept: fnbp.total, lambda g, v, h: g.mean(0)),
    "sq_norms": (lambda v, kept: fnbp.sq_norms, lambda g, v, h: (flat(g) ** 2).sum(1)),
    "second_moment": (lambda v, kept: fnbp.second_moment, lambda g, v, h: (g**2).sum(0)),
    "dot": (lambda v, kept: fnbp.dot(v), lambda g, v, h: flat(g) @ v.ravel()),
    "gram": (lambda v, kept: fnbp.gram, lambda g, v, h: flat(g) @ flat(g).T),
    "cross_gram": (lambda v, kept: fnbp.cross_gram(kept), lambda g, v, h: flat(g) @ flat(h).T),
}


def direction(params):
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)) if is_free(a) else a, params)


def test_the_ids_of_the_cases_differ():
    assert len(BY_ID) == len(CASES)


def compared(case, wrap):
    """Every contraction of a case, in one backward, and the losses, against vmap(jax.grad)."""
    loss, params, batch, values, grads = prepared(case.id)
    names = list(DUE) if case.contracted else ["per_example", "total"]
    v, kept = direction(params), None
    if not is_crossed(case):
        names = [name for name in names if name != "cross_gram"]
    else:
        others = [a if i in case.shared else jax.tree.map(lambda a: a[1:4], a) for i, a in enumerate(batch, 1)]
        kept = tried(case, lambda: wrap(opened(case, loss, fnbp.keep))(params, *others)[1])
    run = wrap(opened(case, loss, {name: DUE[name][0](v, kept) for name in names}))
    found, made = tried(case, lambda: run(params, *batch))
    assert jax.tree.structure(found) == jax.tree.structure(values)
    for one, due in zip(jax.tree.leaves(found), jax.tree.leaves(values), strict=True):
        check(one, due, case.tolerance)
    directions = [np.asarray(a) for a in jax.tree.leaves(v) if is_free(a)]
    for name in names:
        with np.errstate(all="ignore"):
            dues = [DUE[name][1](g, v, g[1:4]) for g, v in zip(map(np.asarray, grads), directions, strict=True)]
        tolerance = case.tolerance if name == "per_example" else max(1e-9, 10 * case.tolerance)
        check_all(pairs(params, made[name]), dues, tolerance, case.floor)


def is_crossed(case):
    """Whether what one batch keeps goes to another one too: a program more, so of the quick cases and some others."""
    return case.contracted and (case.quick or zlib.crc32(case.id.encode()) % 4 == 0)


def tried(case, run):
    """What run returns. A case that may be refused is then skipped."""
    try:
        return run()
    except REFUSED as error:
        if case.either and says(error, case.either):
            pytest.skip(f"refused: {error}")
        raise


@pytest.mark.parametrize("case", named(OPEN, lambda case: case.quick))
def test_contractions_are_those_of_the_gradients_of_jax(x64, case):
    compared(case, jax.jit)


@pytest.mark.slow
@pytest.mark.parametrize("case", named(QUICK))
def test_the_same_without_jit(x64, case):
    compared(case, lambda run: run)


# --- what has no gradient ---


@pytest.mark.parametrize("case", named(case for case in CASES if case.refused))
def test_what_jax_refuses_is_refused_by_name(x64, case):
    loss, params, batch = case.make()
    with pytest.raises(REFUSED) as raised:
        opened(case, loss, fnbp.per_example)(params, *batch)
    assert says(raised.value, case.refused), raised.value


@pytest.mark.parametrize("id", ["leaf: integer", "leaf: boolean", "leaf: a key"])
def test_a_leaf_that_is_not_inexact_has_no_gradient(x64, id):
    loss, params, batch, *_ = prepared(id)
    grads = fnbp.opened(loss, contract=fnbp.per_example)(params, *batch)[1]
    leaves, tree = jax.tree.flatten(params)
    for leaf, grad in zip(leaves, tree.flatten_up_to(grads), strict=True):
        if not is_free(leaf) and grad is not None and jnp.issubdtype(grad.dtype, np.number):
            assert grad.shape == (M, *leaf.shape) and not np.any(grad)


# --- what JAX calls its parts ---


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.checkpoint(jax.jit(f))])
def test_calls_are_read_through(wrap):
    """Under another name or form of an inner jaxpr a call would be met whole: right, but slower."""
    inner = wrap(lambda w, x: jnp.tanh(x @ w))
    uses = fnbp.opened(lambda w, x: inner(w, x).sum()).uses(jnp.ones((3, 2)), jnp.ones((5, 3)))
    assert [(row.primitive, row.rule) for row in uses.rows] == [("dot_general", "outer products")]


def test_loops_are_read_turn_by_turn():
    def loss(p, x):
        h, ys = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + p["b"]), h), x, p["w"], reverse=True)
        return h.sum() + ys.sum()

    params = {"w": jnp.ones((7, 3, 3)), "b": jnp.ones(3), "none": jnp.ones(())}
    uses = fnbp.opened(loss).uses(params, jnp.ones((5, 3)))
    assert [(row.parameter, row.primitive, row.shape) for row in uses.rows] == [
        ("w", "dot_general", (7, 3)),
        ("b", "add", (7, 3)),
    ]
    assert uses.factors == {"w": "Stacked(LaidOut(Outer))", "b": "Sum", "none": "Nothing"}


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda w, x: jax.nn.relu(w * x).sum() + jax.nn.relu(w).sum(), "custom_jvp_call"),
        (lambda w, x: jax.lax.cond(x.sum() > 0, lambda: w, lambda: 2 * w).sum() * x.sum(), "cond"),
    ],
)
def test_what_has_a_rule_of_its_own_is_met_whole(loss, name):
    made = fnbp.opened(loss, check=True)(jnp.ones(3), jnp.linspace(-1, 1, 15).reshape(5, 3))
    steps = [eqn.primitive.name for eqn in jax.make_jaxpr(loss)(jnp.ones(3), jnp.ones(3)).eqns]
    assert name in steps and made[0].shape == (5,)


# --- options ---


def rows_of(loss, params, batch, **options):
    return fnbp.opened(loss, contract=fnbp.per_example, **options)(params, *batch)


def test_total_is_the_default_and_has_the_form_of_params(x64):
    loss, params, batch, _, grads = prepared("linen: Dense")
    total = fnbp.opened(loss)(params, *batch)[1]
    assert jax.tree.structure(total) == jax.tree.structure(params)
    check_all(pairs(params, total), [g.mean(0) for g in grads], 1e-12, 0)


def test_a_leaf_that_is_masked_has_zeros(x64):
    loss, params, batch, _, grads = prepared("scan: consts, xs, carry")
    mask = {"w": True, "u": False, "h": True}
    found = rows_of(loss, params, batch, mask=mask)[1]
    for name, due in zip(sorted(params), grads, strict=True):
        check(found[name], due if mask[name] else np.zeros_like(due), 1e-12, name=name)


def test_a_leaf_that_is_masked_may_go_through_while(x64):
    """JAX refuses no loop that it does not differentiate."""
    loss, params, batch = BY_ID["while: live, data"].make()

    def scaled(p, x):
        return loss(p, x) * p["c"]

    params = params | {"c": jnp.ones(())}
    losses, grads = rows_of(scaled, params, batch, mask={"rate": False, "c": True})
    check(grads["c"], losses, 1e-12)
    assert not grads["rate"].any()


@pytest.mark.parametrize("id", ["scan: nested", "derived: weight norm", "joint: switch, experts", "output: p"])
def test_a_check_passes_on_what_is_right(x64, id):
    loss, params, batch, _, grads = prepared(id)
    check_all(pairs(params, rows_of(loss, params, batch, check=True)[1]), grads, 1e-12, 0)


@pytest.mark.parametrize("m", [1, 2, 7])
def test_any_number_of_examples(x64, m):
    params, x = drawn(np_rng("m"), DENSE), drawn(np_rng("x"), (3,), (m,))
    loss = lambda p, x: energy(dense(p, x))  # noqa: E731
    grads = rows_of(loss, params, (x,))[1]
    check_all(pairs(params, grads), jax.tree.leaves(jax.vmap(jax.grad(loss), (None, 0))(params, x)), 1e-12, 0)


def test_one_function_takes_batches_of_several_shapes(x64):
    run = fnbp.opened(lambda p, x: energy(x * p["w"] + p["v"]), contract=fnbp.sq_norms)
    params = drawn(np_rng("p"), TWO)
    for shape in ((2, 3), (5, 7, 3)):
        losses, norms = run(params, jnp.ones(shape))
        assert losses.shape == norms["w"].shape == shape[:1]


@pytest.mark.parametrize(
    "loss, batch, options",
    [
        (lambda p, x: x * p["w"], (np.ones((5, 3)),), {}),  # no scalar
        (lambda p, x: jnp.argmax(x * p["w"]), (np.ones((5, 3)),), {}),  # an integer
        (lambda p, x: (energy(x * p["w"]), x), (np.ones((5, 3)),), {}),  # a pair, without has_aux
        (lambda p, x: energy(x * p["w"]), (np.ones((5, 3)),), {"has_aux": True}),  # no pair, with it
        (lambda p, x, y: energy(x * p["w"] + y), (np.ones((5, 3)), np.ones((7, 3))), {}),  # 5 examples, and 7
        (lambda p, x: energy(x * p["w"]), (np.ones(()),), {}),  # no axis of examples
        (lambda p, x: energy(x * p["w"]), (np.ones((5, 3)),), {"mask": {"v": True}}),  # a mask of another form
        (lambda p, x: energy(x * p["w"]), (np.ones((5, 3)),), {"shared": (1,)}),  # no example at all
        (lambda p, x: energy(x * p["w"]), (np.ones((5, 3)),), {"shared": (7,)}),  # no such argument
        (lambda p, x: energy(x.real * p["w"]) + 1j, (np.ones((5, 3)),), {}),  # a complex loss
    ],
)
def test_what_is_no_loss_of_an_example_is_refused(x64, loss, batch, options):
    with pytest.raises((TypeError, ValueError), match="opened"):
        fnbp.opened(loss, **options)({"w": jnp.ones(3)}, *batch)
