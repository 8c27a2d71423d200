"""A layer of your own, proven: a matrix of low rank."""

import jax
import jax.numpy as jnp

import fnbp
from fnbp import Outer


def low_rank(n_out: int, rank: int) -> fnbp.Layer:
    """h = x V^T, z = h U^T          dU = dz^T h      dh = dz U      dV = dh^T x      dx = dh V"""

    def init(key, x):
        of_u, of_v = jax.random.split(key)
        U = jax.random.normal(of_u, (n_out, rank), x.dtype) / rank**0.5
        return {"U": U, "V": jax.random.normal(of_v, (rank, x.shape[-1]), x.dtype) / x.shape[-1] ** 0.5}

    def forward(params, x):
        h = x @ params["V"].T
        return h @ params["U"].T, (x, h)

    def backward(params, res, dz):
        x, h = res
        dh = dz @ params["U"]
        return {"U": Outer(dz, h), "V": Outer(dh, x)}, dh @ params["V"]

    return fnbp.stateless(init, forward, backward, f"low_rank({n_out}, {rank})", mask="position")


net, loss = fnbp.serial(low_rank(11, 3), fnbp.tanh(), fnbp.dense(5)), fnbp.softmax_cross_entropy()
x, y = jax.random.normal(jax.random.key(0), (17, 7)), jnp.arange(17) % 5
print(fnbp.compare(net.parts[0], x).ok)  # each leaf, at many points, under jit and vmap
params, state = net.init(jax.random.key(1), x)
print(fnbp.per_example_norms(net, loss)(params, state, x, y).shape)  # the factors give these
