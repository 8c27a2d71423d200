"""Factors: every contraction against the per-example gradients written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnbp
import fnbp.factor
from tests.cases import normal, relative

M, N_OUT, N_IN = 7, 5, 3  # n_out n_in = 15
GRAM = [(3,), (1, 2)]  # S^2 = 9 and 4, below 15
FORMED = [(11,), (2, 5), (4,)]  # S^2 = 121, 100 and 16
POSITIONS = [(), (1,), *GRAM, *FORMED]
each_positions = pytest.mark.parametrize("positions", POSITIONS, ids=lambda s: "x".join(map(str, s)) or "none")


def drawn(positions, dtype=float, m=M):
    rng = np.random.default_rng([m, *positions])
    return normal(rng, (m, *positions, N_OUT), dtype), normal(rng, (m, *positions, N_IN), dtype)


def rows_of(d, x):
    """d_i x_i^T summed over positions, by NumPy."""
    d, x = (np.asarray(a, np.float64).reshape(len(a), -1, a.shape[-1]) for a in (d, x))
    return np.stack([sum(np.outer(d[i, s], x[i, s]) for s in range(d.shape[1])) for i in range(len(d))])


def sums_of(d):
    return np.asarray(d, np.float64).reshape(len(d), -1, d.shape[-1]).sum(1)


def squares(rows):
    return (rows.reshape(len(rows), -1) ** 2).sum(1)


def check(factor, rows, tolerance=1e-12):
    assert relative(factor.per_example(), rows) <= tolerance
    assert relative(factor.total(), rows.sum(0)) <= tolerance
    assert relative(factor.sq_norms(), squares(rows)) <= tolerance


@each_positions
def test_outer_is_the_sum_of_outer_products_over_positions(x64, positions):
    d, x = drawn(positions)
    check(fnbp.Outer(d, x), rows_of(d, x))


@each_positions
def test_sum_is_the_sum_over_positions(x64, positions):
    d, _ = drawn(positions)
    check(fnbp.Sum(d), sums_of(d))


@pytest.mark.parametrize("matrices", [1, 2, 3, 7, 8])
def test_sq_norms_formed_in_chunks_are_the_same(x64, monkeypatch, matrices):
    monkeypatch.setattr(fnbp.contractions, "CHUNK", matrices * N_OUT * N_IN)
    d, x = drawn((11,))
    assert relative(fnbp.Outer(d, x).sq_norms(), squares(rows_of(d, x))) <= 1e-12


def test_a_chunk_holds_one_matrix_at_least(x64, monkeypatch):
    monkeypatch.setattr(fnbp.contractions, "CHUNK", 1)
    d, x = drawn((11,))
    assert relative(fnbp.Outer(d, x).sq_norms(), squares(rows_of(d, x))) <= 1e-12


def intermediates(function, *args):
    """Shapes of all arrays made on the way."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from (tuple(out.aval.shape) for out in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(inner, "jaxpr"):
                        yield from walk(inner.jaxpr)

    return set(walk(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("positions", [(), *GRAM], ids=str)
def test_sq_norms_of_few_positions_form_no_gradient(positions):
    shapes = intermediates(lambda d, x: fnbp.Outer(d, x).sq_norms(), *drawn(positions))
    assert not any(shape[-2:] in ((N_OUT, N_IN), (N_IN, N_OUT)) for shape in shapes)
    count = int(np.prod(positions))
    assert ((M, count, count) in shapes) == (count > 1)


@pytest.mark.parametrize("positions", FORMED, ids=str)
def test_sq_norms_of_many_positions_form_no_gram_matrix_and_a_chunk_of_gradients(monkeypatch, positions):
    monkeypatch.setattr(fnbp.contractions, "CHUNK", 2 * N_OUT * N_IN)
    shapes = intermediates(lambda d, x: fnbp.Outer(d, x).sq_norms(), *drawn(positions))
    count = int(np.prod(positions))
    assert (2, N_OUT, N_IN) in shapes
    assert (M, N_OUT, N_IN) not in shapes
    assert not any(shape[-2:] == (count, count) for shape in shapes)


def test_sq_norms_are_never_below_zero():
    d, x = drawn((1, 1), jnp.float32, m=997)
    d = jnp.concatenate([d, d], 1)
    x = jnp.concatenate([x, -x * (1 + 2.0**-23)], 1)  # the gradient all but cancels
    found = fnbp.Outer(d, x).sq_norms()
    assert (np.asarray(found) >= 0).all()
    assert np.asarray(found).max() < 1e-3


@each_positions
@pytest.mark.parametrize("c", [-1.7, np.random.default_rng(0).standard_normal(M)], ids=["number", "per_example"])
def test_scaled_by_a_number_or_by_one_for_each_example(x64, positions, c):
    d, x = drawn(positions)
    by = np.broadcast_to(c, M)
    check(fnbp.Outer(d, x).scaled(c), by[:, None, None] * rows_of(d, x))
    check(fnbp.Sum(d).scaled(c), by[:, None] * sums_of(d))


def test_scaling_keeps_the_dtype_of_d_and_leaves_x_alone():
    d, x = drawn((3,), jnp.bfloat16)
    outer = fnbp.Outer(d, x).scaled(np.float32(0.5))
    assert outer.d.dtype == jnp.bfloat16 and outer.x is x
    assert fnbp.Sum(d).scaled(jnp.ones(M, jnp.float32)).d.dtype == jnp.bfloat16


def test_scaling_is_done_in_float32():
    assert fnbp.Sum(jnp.full((1, 1), 1.5, jnp.bfloat16)).scaled(257).d == 386  # 257 is no bfloat16, 385.5 rounds to 386
    found = fnbp.Sum(jnp.full((1, 1), 2.0**-10, jnp.float16)).scaled(2**17).d  # 2^17 is no float16
    assert found == 128 and found.dtype == jnp.float16


def test_one_for_each_example_is_never_taken_for_one_a_feature(x64):
    d = normal(np.random.default_rng(0), (5, 5), float)
    c = np.arange(1.0, 6.0)
    assert relative(fnbp.Sum(d).scaled(c).d, c[:, None] * np.asarray(d)) <= 1e-12


def test_contractions_call_the_factor():
    d, x = drawn((3,))
    for factor in (fnbp.Outer(d, x), fnbp.Sum(d)):
        assert fnbp.keep(factor) is factor
        for name in ("total", "sq_norms", "per_example"):
            assert relative(getattr(fnbp, name)(factor), getattr(factor, name)()) == 0


def test_factors_are_frozen_pytrees():
    d, x = drawn((3,))
    outer = fnbp.Outer(d, x)
    assert [leaf.shape for leaf in jax.tree.leaves(outer)] == [d.shape, x.shape]
    doubled = jax.jit(lambda factor: factor.scaled(2))(outer)
    assert isinstance(doubled, fnbp.Outer) and relative(doubled.d, 2 * np.asarray(d)) == 0
    with pytest.raises(AttributeError):
        outer.d = x


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_low_precision_accumulates_in_float32(dtype):
    many = 4 * 1024  # summed in bfloat16, ones stick at 256; in float16 at 2048
    ones, alike = jnp.ones((many, N_OUT), dtype), jnp.ones((many, N_IN), dtype)
    totals = (fnbp.Outer(ones, alike).total(), fnbp.Sum(ones).total())
    rows = (fnbp.Outer(ones[None], alike[None]).per_example(), fnbp.Sum(ones[None]).per_example())
    for found in (*totals, *rows):
        assert found.dtype == dtype and (np.asarray(found, float) == many).all()


@pytest.mark.parametrize("positions", [(), (3,), (11,)], ids=["one", "gram", "formed"])
def test_sq_norms_of_low_precision_are_float32(positions):
    d, x = drawn(positions, jnp.bfloat16)
    found = (fnbp.Outer(d, x).sq_norms(), fnbp.Sum(d).sq_norms())
    assert [a.dtype for a in found] == [jnp.float32] * 2
    assert relative(found, (squares(rows_of(d, x)), squares(sums_of(d)))) <= 1e-6


def test_wide_is_at_least_float32(x64):
    found = {
        name: fnbp.arrays.sums.wide(jnp.ones(2, name)).dtype.name
        for name in ("bfloat16", "float16", "float32", "float64")
    }
    assert found == {"bfloat16": "float32", "float16": "float32", "float32": "float32", "float64": "float64"}


@pytest.mark.parametrize("positions", [(), (11,)], ids=["one", "shared"])
def test_clipping_in_one_pass_is_the_sum_of_clipped_gradients(x64, positions):
    rng = np.random.default_rng(5)
    net, loss = fnbp.serial(fnbp.dense(5), fnbp.tanh(), fnbp.dense(3)), fnbp.mean_squared_error()
    x, y = normal(rng, (M, *positions, 2), float), normal(rng, (M, *positions, 3), float)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype), shapes)
    is_factor = lambda node: isinstance(node, fnbp.Factor)  # noqa: E731

    @jax.jit
    def clipped(params, x, y, limit):
        kept = fnbp.backprop(net, loss, fnbp.keep)(params, state, x, y).grads
        factors = jax.tree.leaves(kept, is_leaf=is_factor)
        norms = jnp.sqrt(sum(factor.sq_norms() for factor in factors))
        scale = jnp.minimum(1, limit / norms)
        return norms, jax.tree.map(lambda factor: factor.scaled(scale).total(), kept, is_leaf=is_factor)

    @jax.jit
    def rows(params):
        own = lambda params, x, y: loss.forward(net.forward(params, state, x[None], fnbp.Context())[0], y[None])[0][0]  # noqa: E731
        return jax.vmap(jax.grad(own), (None, 0, 0))(params, x, y)

    each = rows(params)
    norms = np.sqrt(sum(squares(np.asarray(row)) for row in jax.tree.leaves(each)))
    limit = np.median(norms)  # some are clipped and some are not
    scale = np.minimum(1, limit / norms)
    expected = jax.tree.map(lambda row: np.tensordot(scale, row, 1), each)
    assert relative(clipped(params, x, y, limit), (norms, expected)) <= 1e-12


def test_two_kinds_of_factors_with_the_same_fields_are_two_trees():
    a = jnp.ones((2, 3))
    pairs = (
        (fnbp.Outer(a, a), fnbp.Product(a, a)),
        (fnbp.Sum(a), fnbp.factors.PerExample(a)),
        (fnbp.Sum(a), fnbp.factors.Mixed(a)),
    )
    stacked = (fnbp.factors.Stacked(fnbp.Sum(a)), fnbp.factors.Shared(fnbp.Sum(a)))
    for one, other in (*pairs, stacked):
        assert jax.tree.structure(one) != jax.tree.structure(other)
        assert jax.tree.structure(one) == jax.tree.structure(jax.tree.map(jnp.zeros_like, one))
    assert [str(where[0]) for where, _ in jax.tree_util.tree_leaves_with_path(fnbp.factors.Lookup(a, a, 5))] == [
        ".d",
        ".x",
    ]
