"""The contractions: what can be made of the gradient of a parameter before the sum over examples.

A contraction is a value. It is written for the two forms that every factor has, and says how what it makes leaves a
loop over depth. To add one is a section here; factors stay as they are.

    m  the example, always the first axis        o  the outputs of a weight
    s  positions that share the weight           i  its inputs
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_key, check_size
from fnbp.arrays.placement import by_example, summed
from fnbp.arrays.sums import wide

__all__ = [
    "Contraction",
    "KroneckerPair",
    "cross_gram",
    "dot",
    "gram",
    "kronecker",
    "per_example",
    "project",
    "second_moment",
    "sq_norms",
    "total",
]

CHUNK = 1 << 22  # elements of per-example gradients formed at once, where a contraction has to form them
MOST = 1 << 26  # elements of the second moment of a gradient that is no matrix


def stays(made: Any) -> Any:
    """Of n layers of one shape, the first axis tells which."""
    return made


def added(made: Any) -> Any:
    """The sum over n layers of one shape."""
    return jax.tree.map(lambda a: jnp.sum(a, 0), made)


class Outers(NamedTuple):
    """Gradients as sums of outer products over positions: that of example i is sum_s d_is x_is^T, in that shape.

    Shapes: d (m, S, n_out), x (m, S, n_in). turned is True if x is the error and d what came in.
    """

    d: jax.Array
    x: jax.Array
    shape: tuple[int, ...]
    turned: bool


@dataclass(frozen=True)
class Contraction:
    """What is made of each factor: contraction(factor), or backprop(net, loss, contract=contraction).

        name    a factor that has a method of this name is asked for it: its faster way
        rows    (g, *given) -> the value, of the gradient of each example, g (m, *shape of the parameter)
        outers  (Outers, *given) -> the value, of sums of outer products; None where rows are cheaper
        depth   what becomes of the values of n layers of one shape, (n, ...), at the end of repeat
        joined  how the values of parts of the examples become one: "stacked" along the first axis, "summed", or "whole"
                if it needs all examples at once
        given   a tree of params: what it needs for each parameter

    Values are in at least float32.
    """

    name: str
    rows: Callable[..., Any]
    outers: Callable[..., Any] = lambda *args: None
    depth: Callable[[Any], Any] = stays
    joined: str = "stacked"
    given: Any = field(default=None, compare=False)

    def __call__(self, factor: Any, *given: Any) -> Any:
        """The value of one factor; given: of its parameter."""
        faster = getattr(factor, self.name, None)
        return factor.contracted(self, *given) if faster is None else faster(*given)

    def of_form(self, factor: Any, *given: Any) -> Any:
        """The same, by the forms alone."""
        where = by_example if self.joined == "stacked" else summed
        return where(lambda factor, given: self.of_arrays(factor, *given), factor, given)

    def of_arrays(self, factor: Any, *given: Any) -> Any:
        """The same, on one device."""
        shape, factor = jax.eval_shape(factor.total).shape, factor.widened()
        form = factor.outer()
        if form is not None:
            d, x = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in form)
            made = self.outers(Outers(d, x, shape, factor.turned), *given)
            if made is not None:
                return made
        few = max(1, CHUNK // max(1, int(np.prod(shape))))
        if self.joined == "whole" or not factor.sliced or factor.examples <= few:
            return self.rows(wide(factor.per_example()), *given)
        return self.in_parts(factor, few, *given)

    def in_parts(self, factor: Any, few: int, *given: Any) -> Any:
        """The same, of gradients that are formed a few at a time."""
        axes = factor.example_axes()
        examples = jax.tree.map(lambda a, axis: jnp.moveaxis(a, axis, 0), factor, axes)

        def row(one: Any) -> jax.Array:
            return wide(jax.tree.map(jnp.expand_dims, one, axes).per_example()[0])

        if self.joined == "stacked":
            alone = lambda one: jax.tree.map(lambda a: a[0], self.rows(row(one)[None], *given))  # noqa: E731
            return jax.lax.map(alone, examples, batch_size=few)
        whole = factor.examples // few * few
        parts = jax.tree.map(lambda a: a[:whole].reshape(-1, few, *a.shape[1:]), examples)

        def add(so_far: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, self.rows(jax.vmap(row)(part), *given)), None

        rest = self.rows(jax.vmap(row)(jax.tree.map(lambda a: a[whole:], examples)), *given)
        return jax.lax.scan(add, rest, parts)[0]


# --- total ---

total = Contraction("total", rows=lambda g: jnp.sum(g, 0), joined="summed")
"""The sum over examples. Under backprop: the gradient of the mean loss J."""


# --- per_example ---

per_example = Contraction("per_example", rows=lambda g: g, depth=lambda rows: jnp.moveaxis(rows, 0, 1))
"""Each example's gradient, (m, the shape of the parameter): m times the memory of total."""


# --- sq_norms: |g_i|^2 ---


def sq_norms_of_outers(form: Outers) -> jax.Array | None:
    """|d_i|^2 |x_i|^2 for one position; for S positions sum_st (d_is . d_it) (x_is . x_it) where S^2 < n_out n_in."""
    d, x = form.d, form.x
    positions = d.shape[1]
    if positions == 1:
        return jnp.sum(d**2, (1, 2)) * jnp.sum(x**2, (1, 2))
    if positions**2 >= d.shape[2] * x.shape[2]:
        return None
    products = jnp.einsum("mso,mto->mst", d, d) * jnp.einsum("msi,mti->mst", x, x)
    return jnp.maximum(jnp.sum(products, (1, 2)), 0)  # a sum of squares; rounding can leave it below 0


sq_norms = Contraction(
    "sq_norms", rows=lambda g: jnp.sum(g**2, range(1, g.ndim)), outers=sq_norms_of_outers, depth=added
)
"""The squared norm of each example's gradient, (m,), in at least float32.

Source: Goodfellow 2015, arXiv:1510.01799, for one position; Li et al. 2021, arXiv:2110.05679, for several.
"""


# --- second_moment: sum_i g_i^2 ---


def second_moment_of_outers(form: Outers) -> jax.Array | None:
    """sum_i (d_i^2) (x_i^2)^T for one position."""
    return None if form.d.shape[1] > 1 else jnp.einsum("mso,msi->oi", form.d**2, form.x**2).reshape(form.shape)


second_moment = Contraction(
    "second_moment", rows=lambda g: jnp.sum(g**2, 0), outers=second_moment_of_outers, joined="summed"
)
"""The sum over examples of the square of each number of the gradient: the shape of the parameter.

Source: Dangel, Kunstner & Hennig 2020, arXiv:1912.10985.
"""


# --- dot: <g_i, direction> ---


def dot(direction: Any) -> Contraction:
    """The inner product of each example's gradient with a direction, a tree of params: (m,) for each parameter."""
    return Contraction(
        "dot",
        rows=lambda g, v: jnp.einsum("mp,p->m", flat(g), wide(v).reshape(-1)),
        outers=lambda form, v: jnp.einsum("mso,oi,msi->m", form.d, matrix(v, form), form.x),
        depth=added,
        given=direction,
    )


# --- gram, cross_gram: <g_i, g'_j> ---


def gram_of_outers(form: Outers) -> jax.Array | None:
    """sum_st (d_is . d_jt) (x_is . x_jt), where forming the gradients takes more multiplications."""
    return crossed(form.d, form.x, form.d, form.x)


def crossed(d: jax.Array, x: jax.Array, e: jax.Array, z: jax.Array) -> jax.Array | None:
    """The same for two batches, d x^T and e z^T."""
    (m, s, o), (n, t, i) = d.shape, z.shape
    if m * s * n * t * (o + i) >= (m * s + n * t + m * n) * o * i:
        return None
    return jnp.einsum("msnt->mn", jnp.einsum("mso,nto->msnt", d, e) * jnp.einsum("msi,nti->msnt", x, z))


gram = Contraction("gram", rows=lambda g: flat(g) @ flat(g).T, outers=gram_of_outers, depth=added, joined="whole")
"""The inner products of the gradients of all pairs of examples, (m, m) for each parameter."""


def cross_gram(factors: Any) -> Contraction:
    """The inner products with the gradients of another batch, of which keep has kept the factors: (m, n)."""

    def of_outers(form, other):
        theirs = other.widened().outer()
        if theirs is None:
            return None
        return crossed(form.d, form.x, *(a.reshape(a.shape[0], -1, a.shape[-1]) for a in theirs))

    def of_rows(g, other):
        return flat(g) @ flat(wide(other.widened().per_example())).T

    return Contraction("cross_gram", of_rows, of_outers, depth=added, joined="whole", given=factors)


# --- kronecker: A and G, whose Kronecker product stands for the curvature ---


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerPair:
    """A and G of a parameter: of its gradient as a matrix (n_out, n_in), G stands for the rows and A for the columns.

    A, G      the two matrices, also as A, G = pair; axes in front are the layers of a repeat
    turned    True if the parameter is (n_in, ..., n_out), as of an embedding, so that A stands for the rows
    diagonal  True if A is a diagonal, (n_in,)
    """

    A: Any
    G: Any
    turned: bool = field(default=False, metadata={"static": True})
    diagonal: bool = field(default=False, metadata={"static": True})

    def __iter__(self) -> Iterator[Any]:
        return iter((self.A, self.G))

    def __getitem__(self, i: int) -> Any:
        return (self.A, self.G)[i]

    def matrix(self, g: jax.Array) -> jax.Array:
        """An array of the shape of the parameter as (..., n_out, n_in), with as many axes in front as A has."""
        n, front = self.A.shape[-1], g.shape[: self.A.ndim - (1 if self.diagonal else 2)]
        return jnp.swapaxes(g.reshape(*front, n, -1), -1, -2) if self.turned else g.reshape(*front, -1, n)

    def param(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of matrix: in the shape of the parameter."""
        return (jnp.swapaxes(matrix, -1, -2) if self.turned else matrix).reshape(shape)


def kronecker(reduce: str = "expand") -> Contraction:
    """The KroneckerPair (A, G) of each parameter: the second moments of what goes in and of the error of each example.

        expand  A = sum_is x_is x_is^T / (m S)        G = sum_is d_is d_is^T / m
        reduce  A = sum_i xbar_i xbar_i^T / m         G = sum_i dbar_i dbar_i^T / m
                xbar_i the mean over positions, dbar_i the sum

    A bias has A = 1. An embedding has as A the diagonal, (size,), and so have positions, which look up one row after
    the other. What multiplies element by element has A = 1, and as G the second moment of its gradients, which is
    stated: it is no approximation.

    Shapes: A (n_in, n_in), G (n_out, n_out); of n layers of a repeat (n, ...).
    Source: Martens & Grosse 2015, arXiv:1503.05671, section 3; Eschenhagen et al. 2023, arXiv:2311.00636, for expand
            and reduce.
    Raises: ValueError if reduce is neither of the two, or, by the name of the layer, if G would have more than 2^26
            numbers.
    """
    if reduce not in ("expand", "reduce"):
        raise ValueError(f"kronecker: reduce must be 'expand' or 'reduce', got {reduce!r}")

    def outers(form):
        x, d = (form.d, form.x) if form.turned else (form.x, form.d)
        m, positions = d.shape[:2]
        if reduce == "reduce":
            d, x = jnp.sum(d, 1, keepdims=True), jnp.mean(x, 1, keepdims=True)
            positions = 1
        A, G = jnp.einsum("msi,msj->ij", x, x) / (m * positions), jnp.einsum("mso,msp->op", d, d) / m
        return KroneckerPair(A, G, form.turned)

    def rows(g):
        g = flat(g)
        if g.shape[1] ** 2 > MOST:
            raise ValueError(f"kronecker: a parameter of {g.shape[1]} numbers that is no matrix has too large a G")
        return KroneckerPair(jnp.ones((1, 1), g.dtype), g.T @ g / g.shape[0])

    return Contraction(f"kronecker_{reduce}", rows, outers, joined="whole")


def second_moment_in(bases: Any) -> Contraction:
    """sum_i (U_G^T g_i U_A)^2 of each parameter: the second moment of its gradients, seen as matrices, in a basis.

    bases is a tree of params, for each a KroneckerPair of U_A and U_G. A diagonal A has its own numbers as basis.

    Shapes: (n_out, n_in); of n layers of a repeat (n, n_out, n_in).
    """

    def rows(g, bases):
        g = jax.vmap(bases.matrix)(g)
        g = g if bases.diagonal else g @ bases.A
        return jnp.sum(jnp.einsum("op,moi->mpi", bases.G, g) ** 2, 0)

    def outers(form, bases):
        x, d = (form.d, form.x) if form.turned else (form.x, form.d)
        d, x = d @ bases.G, x if bases.diagonal else x @ bases.A
        if d.shape[1] == 1:
            return jnp.einsum("mso,msi->oi", d**2, x**2)
        few = max(1, CHUNK // (d.shape[2] * x.shape[2]))
        parts = [jnp.pad(a, ((0, -len(a) % few), (0, 0), (0, 0))).reshape(-1, few, *a.shape[1:]) for a in (d, x)]

        def add(so_far, part):
            return so_far + jnp.sum(jnp.einsum("mso,msi->moi", *part) ** 2, 0), None

        return jax.lax.scan(add, jnp.zeros((d.shape[2], x.shape[2]), d.dtype), tuple(parts))[0]

    return Contraction("second_moment_in", rows, outers, joined="summed", given=bases)


# --- project: (P d_i) (Q x_i)^T ---


def project(key: jax.Array, k_out: int, k_in: int) -> Contraction:
    """Each example's gradient, seen as a matrix g_i, at random: P g_i Q^T, as a row of k_out k_in numbers.

        <P g_i Q^T, P g_j Q^T> has the mean <g_i, g_j>      P, Q: independent normal numbers / sqrt(k_out), sqrt(k_in)

    Of a sum of outer products it is sum_s (P d_is) (Q x_is)^T, and no gradient is formed. P and Q are the same for
    every batch. Within a repeat each turn has its own numbers, with the same P and Q.

    Shapes: (m, k_out k_in); of n layers of a repeat (m, n k_out k_in).
    Source: Park et al. 2023, arXiv:2303.14186, for projected gradients; Choe et al. 2024, arXiv:2405.13954, for a
            projection of both sides.
    """
    check_key("project", key)
    check_size("project", "k_out", k_out)
    check_size("project", "k_in", k_in)
    keys = jax.random.split(key)

    def matrices(n_out, n_in, dtype):
        P = jax.random.normal(jax.random.fold_in(keys[0], n_out), (k_out, n_out), dtype) / np.sqrt(k_out)
        return P, jax.random.normal(jax.random.fold_in(keys[1], n_in), (k_in, n_in), dtype) / np.sqrt(k_in)

    def outers(form):
        P, Q = matrices(form.d.shape[2], form.x.shape[2], form.d.dtype)
        return flat(jnp.einsum("msk,msl->mkl", form.d @ P.T, form.x @ Q.T))

    def rows(g):
        g = g.reshape(*g.shape[:2], -1) if g.ndim > 1 else g[:, None, None]
        P, Q = matrices(g.shape[1], g.shape[2], g.dtype)
        return flat(jnp.einsum("moi,ko,li->mkl", g, P, Q))

    return Contraction("project", rows, outers, depth=lambda made: flat(jnp.moveaxis(made, 0, 1)))


def matrix(v: jax.Array, form: Outers) -> jax.Array:
    """An array of the shape of the parameter, as (n_out, n_in)."""
    return wide(v).reshape(form.d.shape[2], form.x.shape[2])


def flat(g: jax.Array) -> jax.Array:
    """(m, *shape) as (m, p)."""
    return g.reshape(g.shape[0], -1)
