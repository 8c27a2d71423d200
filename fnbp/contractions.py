"""The contractions: what can be made of the gradient of a parameter before the sum over examples.

A contraction is a value. It is written for the two forms that every factor has, and says how what it makes leaves a
loop over depth. To add one is a section here; factors stay as they are.

    m  the example, always the first axis        o  the outputs of a weight
    s  positions that share the weight           i  its inputs
"""

from collections.abc import Callable
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
    "cross_gram",
    "dot",
    "gram",
    "per_example",
    "project",
    "second_moment",
    "sq_norms",
    "total",
]

CHUNK = 1 << 22  # elements of per-example gradients formed at once, where a contraction has to form them


def stays(made: Any) -> Any:
    """Of n layers of one shape, the first axis tells which."""
    return made


def added(made: Any) -> Any:
    """The sum over n layers of one shape."""
    return jax.tree.map(lambda a: jnp.sum(a, 0), made)


def linear(made: Any, c: float) -> Any:
    """What was made of the error d, as it is of c d: c times that."""
    return jax.tree.map(lambda a: a * jnp.asarray(c, a.dtype), made)


def along(made: jax.Array, move: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """What has the axes of the parameter last, moved as it is."""
    return move(made)


def anyhow(made: Any, move: Callable[[jax.Array], jax.Array]) -> Any:
    """What does not depend on where the numbers stand."""
    return made


def quadratic(made: Any, c: float) -> Any:
    """The same, c^2 times that."""
    return linear(linear(made, c), c)


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
        scaled  (value, c) -> the value if d were c d: backprop then scales it, and not the error, to that of each
                example's own loss
        moved   (value, move) -> the value if the numbers of the parameter stood elsewhere: move moves the last axes
                of an array so. None if the value depends on where they stand
        given   a tree of params: what it needs for each parameter

    Values are in at least float32.
    """

    name: str
    rows: Callable[..., Any]
    outers: Callable[..., Any] = lambda *args: None
    depth: Callable[[Any], Any] = stays
    joined: str = "stacked"
    scaled: Callable[[Any, float], Any] | None = None
    moved: Callable[[Any, Callable], Any] | None = None
    given: Any = field(default=None, compare=False)

    def __call__(self, factor: Any, *given: Any) -> Any:
        """The value of one factor; given: of its parameter."""
        faster = factor.faster(self.name)
        return factor.contracted(self, *given) if faster is None else faster(*given)

    def of_form(self, factor: Any, *given: Any) -> Any:
        """The same, by the forms alone."""
        where = by_example if self.joined == "stacked" else summed
        return where(lambda factor, given: self.of_arrays(factor, *given), factor, given)

    def of_arrays(self, factor: Any, *given: Any) -> Any:
        """The same, on one device."""
        made = self.of_outers(factor, *given)
        if made is not None:
            return made
        few = at_once(factor)
        if self.joined == "whole" or not factor.sliced or factor.examples <= few:
            return self.rows(rows_of(factor), *given)
        return self.in_parts(factor.widened(), few, *given)

    def of_outers(self, factor: Any, *given: Any) -> Any:
        """The same, of a sum of outer products; None if there is none, or rows are cheaper."""
        form = factor.widened().outer()
        if form is None:
            return None
        d, x = (a.reshape(a.shape[0], -1, a.shape[-1]) for a in form)
        return self.outers(Outers(d, x, jax.eval_shape(factor.total).shape, factor.turned), *given)

    def forms_rows(self, factor: Any, *given: Any) -> bool:
        """True if it forms the gradients of all examples at once, where what else needs them finds them."""
        if self is total or factor.faster(self.name) is not None or factor.examples > at_once(factor):
            return False
        return jax.eval_shape(self.of_outers, factor, *given) is None

    def in_parts(self, factor: Any, few: int, *given: Any) -> Any:
        """The same, of gradients that are formed a few at a time."""
        arrays, tree = jax.tree.flatten(factor)
        axes = jax.tree.leaves(factor.example_axes())
        examples = [jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True) if axis >= 0]

        def row(one: list[Any]) -> jax.Array:
            own = iter(one)
            whole = [jnp.expand_dims(next(own), axis) if axis >= 0 else a for a, axis in zip(arrays, axes, strict=True)]
            return wide(jax.tree.unflatten(tree, whole).per_example()[0])

        if self.joined == "stacked":
            alone = lambda one: jax.tree.map(lambda a: a[0], self.rows(row(one)[None], *given))  # noqa: E731
            return jax.lax.map(alone, examples, batch_size=few)
        whole = factor.examples // few * few
        parts = jax.tree.map(lambda a: a[:whole].reshape(-1, few, *a.shape[1:]), examples)

        def add(so_far: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, self.rows(jax.vmap(row)(part), *given)), None

        rest = self.rows(jax.vmap(row)(jax.tree.map(lambda a: a[whole:], examples)), *given)
        return jax.lax.scan(add, rest, parts)[0]


def at_once(factor: Any) -> int:
    """Of how many examples the gradients are formed at once, by the size of the largest gradient."""
    return max(1, CHUNK // max(1, factor.widest()))


def rows_of(factor: Any) -> jax.Array:
    """The gradient of each example, in at least float32."""
    return wide(factor.widened().per_example())


# --- total ---

total = Contraction("total", rows=lambda g: jnp.sum(g, 0), joined="summed", moved=along)
"""The sum over examples. Under backprop: the gradient of the mean loss J."""


# --- per_example ---

per_example = Contraction(
    "per_example", lambda g: g, depth=lambda rows: jnp.moveaxis(rows, 0, 1), scaled=linear, moved=along
)
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
    "sq_norms", lambda g: jnp.sum(g**2, range(1, g.ndim)), sq_norms_of_outers, added, scaled=quadratic, moved=anyhow
)
"""The squared norm of each example's gradient, (m,), in at least float32.

Under backprop the square is taken of the gradient of J, g_i / m: in float32 a norm below 1e-19 m comes as 0.

Source: Goodfellow 2015, arXiv:1510.01799, for one position; Li et al. 2021, arXiv:2110.05679, for several.
"""


# --- second_moment: sum_i g_i^2 ---


def second_moment_of_outers(form: Outers) -> jax.Array | None:
    """sum_i (d_i^2) (x_i^2)^T for one position."""
    return None if form.d.shape[1] > 1 else ((form.d[:, 0] ** 2).T @ (form.x[:, 0] ** 2)).reshape(form.shape)


second_moment = Contraction(
    "second_moment", lambda g: jnp.sum(g**2, 0), second_moment_of_outers, joined="summed", scaled=quadratic, moved=along
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
        scaled=linear,
        moved=anyhow,
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


gram = Contraction(
    "gram", lambda g: flat(g) @ flat(g).T, gram_of_outers, added, joined="whole", scaled=quadratic, moved=anyhow
)
"""The inner products of the gradients of all pairs of examples, (m, m) for each parameter."""


def cross_gram(factors: Any) -> Contraction:
    """The inner products with the gradients of another batch, of which keep has kept the factors: (m, n)."""

    def of_outers(form, other):
        theirs = other.bare().widened().outer()
        if theirs is None:
            return None
        return crossed(form.d, form.x, *(a.reshape(a.shape[0], -1, a.shape[-1]) for a in theirs))

    def of_rows(g, other):
        return flat(g) @ flat(rows_of(other.bare())).T

    return Contraction("cross_gram", of_rows, of_outers, added, "whole", scaled=linear, moved=anyhow, given=factors)


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

    return Contraction("project", rows, outers, depth=lambda made: flat(jnp.moveaxis(made, 0, 1)), scaled=linear)


def matrix(v: jax.Array, form: Outers) -> jax.Array:
    """An array of the shape of the parameter, as (n_out, n_in)."""
    return wide(v).reshape(form.d.shape[2], form.x.shape[2])


def flat(g: jax.Array) -> jax.Array:
    """(m, *shape) as (m, p)."""
    return g.reshape(g.shape[0], -1)
