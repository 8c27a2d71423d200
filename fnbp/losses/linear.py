"""The last matrix of a net and its cross-entropy in one: the scores of all positions are never held."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fnbp.arrays.checks import describe
from fnbp.arrays.placement import varying, with_sums
from fnbp.arrays.sums import complement, wide
from fnbp.construction import constructor
from fnbp.losses.entropy import at_label, check_against, softmax_cross_entropy
from fnbp.losses.loss import Loss
from fnbp.losses.reduction import check_options, check_z_loss, counted, only, share, shares, summed_up
from fnbp.losses.targets import is_good

__all__ = ["linear_cross_entropy"]

BLOCK = 2**22  # scores that are held at a time, 16 MB in float32
ROWS = 256  # positions of a block, at least: fewer make a slow product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Scores a = x W^T + b before they are formed: what a dense layer hands to a loss that forms them by itself.

    As a cotangent: dx, dW and db.

    Shapes: x (m, ..., n); W (k, n); b (k,) or None; dtype, that of a, is static.
    """

    x: Any
    W: Any
    b: Any
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, ..., k)"""
        return (*self.x.shape[:-1], self.W.shape[0])

    @property
    def ndim(self) -> int:
        """How many axes a has."""
        return self.x.ndim

    def formed(self) -> jax.Array:
        """a"""
        a = self.x @ self.W.T
        return (a if self.b is None else a + self.b).astype(self.dtype)


@constructor
def linear_cross_entropy(
    ignore_index: int | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0, reduce: str = "examples"
) -> Loss:
    """Cross-entropy of softmax(x W^T + b) and a label, together with the last layer of the net, fnbp.dense.

        a = x W^T + b      l = softmax_cross_entropy(a, y), da its cotangent
        dW = da^T x      db = sum da      dx = da W

    For many classes. In fnbp.backprop and fit neither a nor da is held: both are formed for some of the positions at a
    time, and dx, dW and db already in the forward, so that a is formed once. The net, its params and its prediction are
    as with softmax_cross_entropy, and so are the numbers.

    The scores are formed whole, as by softmax_cross_entropy, in predict, evaluate, trace and compare, by any
    contraction but total, and if params are split over devices.

    Shapes:   x (m, ..., n); W (k, n); y (m, ...) of integer labels below k; l (m,); saved dx, dW, db.
    Options:  as in softmax_cross_entropy.
    Source:   Hsu et al. 2024, arXiv:2410.10989, section 3.2, for the blocks; else as softmax_cross_entropy.
    Raises:   TypeError if the net does not end in fnbp.dense, or its functions were replaced, or y holds no labels;
              else as softmax_cross_entropy.
    """
    name = "linear_cross_entropy"
    e, c = check_options(name, ignore_index, label_smoothing, reduce), check_z_loss(name, z_loss)
    whole = softmax_cross_entropy(ignore_index, None, e, reduce, c)

    def check(a, y, mask=None):
        if getattr(y, "ndim", None) == getattr(a, "ndim", -1):
            raise TypeError(f"{name}: y must be labels, got {describe(y)}; softmax_cross_entropy takes distributions")
        check_against(name, None, ignore_index, a, y, mask)

    def forward(a, y, mask=None):
        check(a, y, mask)
        return whole.forward(a, y, mask)

    def forward_of_scores(a: Scores, y, mask=None) -> tuple[Float[Array, " m"], Scores]:
        check(a, y, mask)
        counts = counted(mask, y, ignore_index)
        x, y = only(counts, a.x), only(counts, y)
        at = shares(reduce, jnp.zeros(y.shape, wide(jnp.zeros((), a.dtype)).dtype), counts)
        losses, da = in_blocks(Scores(x, a.W, a.b, a.dtype), y, at, e, c)
        return summed_up(at, losses), da

    of_scores = Loss(forward_of_scores, lambda da: da, name, check, True, whole.positions)
    return Loss(forward, whole.backward, name, check, True, whole.positions, whole.roots, of_scores=of_scores)


def in_blocks(a: Scores, y: jax.Array, at: Any, e: float, c: float) -> tuple[jax.Array, Scores]:
    """The loss of each position, (m, ...), and the cotangent of a for the sum of losses / s; at: 1 / s, see shares."""

    def of_all(x, W, b, y, w):
        n, rows = blocks(y.size, W.shape[0])

        def cut(of_positions, *shape):
            """(rows, n, ...) turned round: a block has positions from everywhere, so from every device."""
            filled = jnp.pad(of_positions.reshape(y.size, -1), ((0, n * rows - y.size), (0, 0)))
            return filled.reshape(rows, n, *shape).swapaxes(0, 1)

        def joined(of_blocks):
            return of_blocks.swapaxes(0, 1).reshape(n * rows, *of_blocks.shape[2:])[: y.size]

        def turn(sums, block):
            x, y, w = block
            losses, d = of_block(Scores(x, W, b, a.dtype), y, w, e, c)
            made = product("rk,ri->ki", d, x), None if b is None else jnp.sum(wide(d), 0)
            return jax.tree.map(jnp.add, sums, made), (losses, product("rk,ki->ri", d, W).astype(x.dtype))

        start = jax.tree.map(lambda p: varying(jnp.zeros(p.shape, wide(p).dtype), x, W, b, y, w), (W, b))
        (dW, db), (losses, dx) = jax.lax.scan(turn, start, (cut(x, x.shape[-1]), cut(y), cut(w)))
        return (joined(losses).reshape(y.shape), joined(dx).reshape(x.shape)), (dW, db)

    w = jnp.broadcast_to(jnp.asarray(at, wide(jnp.zeros((), a.dtype)).dtype), y.shape)
    (losses, dx), (dW, db) = with_sums(of_all, a.x, a.W, a.b, y, w)
    return losses, Scores(dx, dW, db, a.dtype)


def blocks(positions: int, k: int) -> tuple[int, int]:
    """How many blocks there are, and how many positions each has; the last ones are filled up."""
    least = -(-positions // max(ROWS, BLOCK // k))
    n = next((n for n in range(least, 2 * least) if positions % n == 0), least)
    return n, -(-positions // n)


def product(subscripts: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """A product, summed in at least float32."""
    return jnp.einsum(subscripts, one, other, preferred_element_type=wide(one).dtype)


def of_block(a: Scores, y: jax.Array, w: jax.Array, e: float, c: float) -> tuple[jax.Array, jax.Array]:
    """The losses of rows, (r,), and w times their da, (r, k), in the dtype of x.

    z = log sum_j e^a_j      l = z - (1 - e) a_y - e / k sum a + c z^2
    da = (1 + 2 c z) y_hat - (1 - e) one_hot(y) - e / k      in a form that does not cancel if y_hat is near 1
    """
    scores, k = wide(a.formed()), a.shape[-1]
    M = jnp.max(scores, -1, keepdims=True)
    E = jax.lax.optimization_barrier(jnp.exp(scores - M))  # held: to read it is cheaper than another exponential
    whole, others = jnp.sum(E, -1, keepdims=True), jnp.sum(jnp.where(E < 1, E, 0), -1, keepdims=True)
    r = jnp.where(whole < 1.5, others, whole - 1)  # as log_total has it
    z = M + jnp.log1p(r)
    losses = (jnp.log1p(r) - (1 - e) * (at_label(scores, y)[:, None] - M))[:, 0]
    if e:
        losses = losses - e / k * jnp.sum(scores - M, -1)
    if c:
        losses = losses + c * z[:, 0] ** 2
    y_hat, g = E / (1 + r), 1 + 2 * c * z if c else 1
    at_y = (g - (1 - e)) * y_hat - (1 - e) * complement(y_hat, r)
    da = jnp.where(jnp.arange(k) == y[:, None], at_y, g * y_hat) - e / k
    return losses, share(w, jnp.where(is_good(scores, y)[:, None], da, jnp.nan)).astype(a.x.dtype)
