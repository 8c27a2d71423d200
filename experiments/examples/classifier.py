"""Train a classifier with all that a real training has, and go on after a kill.

Schedule, decay by name, clipping, augmentation, class weights, metrics, early stopping, best parameters, checkpoints,
and a record as JSON and for TensorBoard.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tensorboardX import SummaryWriter

import fnbp

images, y = load_digits(return_X_y=True)
x = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
parts = np.split(np.arange(len(y)), [1200, 1437])  # 1,200 to train on, 237 held out, 360 to test


def shifted(key, batch):
    """Move the images of a batch by one pixel at most."""
    return jnp.roll(batch[0], jax.random.randint(key, (2,), -1, 2), (1, 2)), batch[1]


net = fnbp.serial(
    fnbp.conv(32, (3, 3)), fnbp.relu(), fnbp.max_pool(2), fnbp.flatten(), fnbp.dense(64), fnbp.relu(), fnbp.dense(10)
)
loss = fnbp.softmax_cross_entropy(weights=1 / (10 * np.bincount(y, minlength=10) / len(y)))
rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 40, 800)
adamw = optax.inject_hyperparams(optax.adamw, static_args="mask")(rate, mask=fnbp.matching(net, "*.W"))
folder = Path(tempfile.mkdtemp())
keep = fnbp.run_record(folder / "record", {"batch": 64, "rate": 1e-2}, SummaryWriter(str(folder / "record")))


def train():
    """Train, or go on from the newest checkpoint."""
    return fnbp.fit(
        net, loss, *net.init(jax.random.key(0), x), fnbp.Batches(x[parts[0]], y[parts[0]], 64, augment=shifted),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw), key=jax.random.key(1), epochs=40, patience=10,
        validation=fnbp.Validation(x[parts[1]], y[parts[1]], [fnbp.accuracy(), fnbp.confusion(10)]),
        record=[fnbp.gradient_norm, fnbp.learning_rate], on_epoch=keep, progress=False,
        checkpoint=fnbp.Checkpoints(folder / "checkpoints", steps=100),
    )  # fmt: skip


done = train()
keep(done)
best = done.best or done
test = fnbp.evaluate(net, loss, best.params, best.state, x[parts[2]], y[parts[2]], metrics=fnbp.accuracy())
print(f"{done.stopped}: {done.message}")
print(f"accuracy {test['accuracy']:.0%} at step {best.step}; {len(list((folder / 'record').iterdir()))} files")
again = train()  # as after a kill: it goes on from the newest checkpoint
print("again:", "the same" if (again.step, again.least) == (done.step, done.least) else "another")
