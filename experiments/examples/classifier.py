"""Train a classifier with all that a real training has, and go on after a kill.

Schedule, decay by name, clipping, augmentation, class weights, metrics, early stopping, best parameters, checkpoints.
"""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fnbp

images, labels = load_digits(return_X_y=True)
x, y = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels
parts = np.split(np.arange(len(y)), [1200, 1437])  # 1,200 to train on, 237 held out, 360 to test


def shifted(key, batch):
    """Move the images of a batch by one pixel at most."""
    x, y = batch
    shift = jax.random.randint(key, (2,), -1, 2)
    return jnp.roll(x, shift, (1, 2)), y


net = fnbp.serial(
    fnbp.conv(32, (3, 3)), fnbp.relu(), fnbp.max_pool(2), fnbp.flatten(), fnbp.dense(64), fnbp.relu(), fnbp.dense(10)
)
loss = fnbp.softmax_cross_entropy(weights=1 / (10 * np.bincount(y, minlength=10) / len(y)))
params, state = net.init(jax.random.key(0), x)
rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 40, 800)
adamw = optax.inject_hyperparams(optax.adamw, static_args="mask")(rate, mask=fnbp.matching(net, "*.W"))
held_out = fnbp.Validation(x[parts[1]], y[parts[1]], [fnbp.accuracy(), fnbp.confusion(10)])
folder = Path(tempfile.mkdtemp())


def train():
    """Train, or go on from the newest checkpoint."""
    return fnbp.fit(
        net, loss, params, state, fnbp.Batches(x[parts[0]], y[parts[0]], 64, augment=shifted),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw), key=jax.random.key(1), epochs=40, patience=10,
        validation=held_out, record=[fnbp.gradient_norm, fnbp.learning_rate], progress=False,
        checkpoint=fnbp.Checkpoints(folder / "checkpoints", steps=100),
    )  # fmt: skip


done = train()
best = done.best
assert best is not None  # there is one, because there is a validation
(folder / "history.json").write_text(json.dumps(done.history.to_dict()))
test = fnbp.evaluate(net, loss, best.params, best.state, x[parts[2]], y[parts[2]], metrics=fnbp.accuracy())
print(f"{done.stopped}: {done.message}")
last = done.history.recorded["learning_rate"][-1]
print(f"accuracy {test['accuracy']:.0%} at step {best.step}, learning rate {last:.4f} at the end")
again = train()  # as after a kill: it goes on from the newest checkpoint
print("again:", "the same" if (again.step, again.least) == (done.step, done.least) else "another")
