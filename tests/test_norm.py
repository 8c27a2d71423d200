"""What batch_norm keeps beside its gradients, and what dropout draws."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp

rng = np.random.default_rng(0)
TRAINING = fnbp.Context(jax.random.key(3), train=True)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed (extra: peers)")
def test_running_statistics_are_pytorchs(x64):
    import torch

    ours, theirs = fnbp.batch_norm(momentum=0.3), torch.nn.BatchNorm2d(3, momentum=0.3, dtype=torch.float64)
    x = rng.standard_normal((4, 2, 5, 7, 3))
    params, state = ours.init(jax.random.key(0), jnp.asarray(x[0]))
    for batch in x:
        _, state, _ = ours.forward(params, state, jnp.asarray(batch), TRAINING)
        theirs(torch.tensor(batch).movedim(-1, 1))
    np.testing.assert_allclose(state["mean"], theirs.running_mean, rtol=1e-12)
    np.testing.assert_allclose(state["var"], theirs.running_var, rtol=1e-12)
    assert int(state["count"]) == int(theirs.num_batches_tracked) == 4
    theirs.eval()
    y, after, _ = ours.forward(params, state, jnp.asarray(x[0]), fnbp.Context())
    np.testing.assert_allclose(y, theirs(torch.tensor(x[0]).movedim(-1, 1)).movedim(1, -1).detach(), rtol=1e-12)
    assert after is state


def test_batch_norm_in_use_has_per_example_norms_and_in_training_says_why_not():
    net = fnbp.serial(fnbp.dense(5), fnbp.batch_norm(), fnbp.relu(), fnbp.dense(3))
    x, y = jnp.asarray(rng.standard_normal((7, 11)), jnp.float32), jnp.arange(7) % 3
    params, state = net.init(jax.random.key(0), x)
    loss = fnbp.softmax_cross_entropy()
    with pytest.raises(TypeError, match=r"serial\[1\].batch_norm: it mixes the examples of a batch, so no example has"):
        fnbp.per_example_norms(net, loss)(params, state, x, y, TRAINING)
    state = fnbp.backprop(net, loss)(params, state, x, y, TRAINING).state
    norms = fnbp.per_example_norms(net, loss)(params, state, x, y)

    def one(x, y):
        grads = fnbp.value_and_grad(net, loss)(params, state, x[None], y[None])[1]
        return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))

    np.testing.assert_allclose(norms, jax.vmap(one)(x, y), rtol=1e-5)


def test_dropout_keeps_the_mean_and_drops_as_often_as_it_says():
    x = jnp.ones((1000, 100))
    y, _, (keep,) = fnbp.dropout(0.3).forward({}, {}, x, TRAINING)
    assert abs(float(y.mean()) - 1) < 0.01 and abs(float(keep.mean()) - 0.7) < 0.01
    other = fnbp.dropout(0.3).forward({}, {}, x, fnbp.Context(jax.random.key(4), train=True))[2][0]
    assert (keep != other).any()


def test_drop_path_drops_whole_examples():
    y = fnbp.drop_path(0.3).forward({}, {}, jnp.ones((1000, 5)), TRAINING)[0]
    assert set(np.unique(y.sum(1)).round(4)) == {0, np.float32(5 / 0.7).round(4)}
    assert abs(float((y[:, 0] > 0).mean()) - 0.7) < 0.05


def test_a_key_draws_the_same_mask_in_every_precision():
    keep = fnbp.dropout(0.5).forward({}, {}, jnp.ones((7, 11), jnp.bfloat16), TRAINING)[2][0]
    with jax.enable_x64(True):
        wide = fnbp.dropout(0.5).forward({}, {}, jnp.ones((7, 11), jnp.float64), TRAINING)[2][0]
    assert (keep == wide).all()


def test_every_part_of_a_net_draws_for_itself():
    net = fnbp.serial(fnbp.dropout(0.5), fnbp.dropout(0.5))
    x = jnp.ones((7, 101))
    params, state = net.init(jax.random.key(0), x)
    (first,), (second,) = net.forward(params, state, x, TRAINING)[2]
    assert (first != second).any()


def test_a_net_with_state_keys_and_images_is_trained_and_validated():
    """Two kinds of stripes, told apart by a convolution, batch_norm and dropout: state and keys go through fit."""
    upright = rng.integers(0, 2, 64)
    stripes = np.where(upright[:, None, None], np.arange(8) % 2, np.arange(8)[:, None] % 2)[..., None]
    x = jnp.asarray(stripes + 0.3 * rng.standard_normal((64, 8, 8, 1)), jnp.float32)
    y = jnp.asarray(upright)
    net = fnbp.serial(
        fnbp.conv(4, 3, b=None), fnbp.batch_norm(), fnbp.relu(), fnbp.max_pool(2), fnbp.dropout(0.2),
        fnbp.flatten(), fnbp.dense(2),
    )  # fmt: skip
    params, state = net.init(jax.random.key(0), x)
    done = fnbp.fit(
        net, fnbp.softmax_cross_entropy(), params, state, x[:48], y[:48], optimizer=optax.adam(1e-2),
        key=jax.random.key(1), batch_size=16, epochs=15, validation=(x[48:], y[48:]), progress=False,
    )  # fmt: skip
    assert done.history.validation_loss[-1] < 0.2 and int(done.state[1]["count"]) == 45
    assert not jnp.allclose(done.state[1]["mean"], state[1]["mean"])
