"""Train a net by its manual backward, save its parameters by its names and by PyTorch's, load them and predict."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from safetensors.flax import load_file, save_file
from safetensors.numpy import save_file as save_arrays
from sklearn.datasets import load_digits

import fnbp

images, labels = load_digits(return_X_y=True)
x, y = (images / 16).astype(np.float32), labels
train, test = slice(0, 1437), slice(1437, None)

net, loss = fnbp.serial(fnbp.dense(64), fnbp.relu(), fnbp.dense(10)), fnbp.softmax_cross_entropy()
params, state = net.init(jax.random.key(0), x)
done = fnbp.fit(
    net, loss, params, state, x[train], y[train],
    optimizer=optax.adam(3e-3), key=jax.random.key(1), batch_size=32, epochs=20, progress=False,
)  # fmt: skip

folder = Path(tempfile.mkdtemp())
file = folder / "digits.safetensors"
save_file(fnbp.named(net, done.params), file)
loaded = fnbp.with_named(net, params, load_file(file))

print(*fnbp.named(net, params), sep="\n")
prediction, before = (fnbp.predict(net, p, done.state, x[test]).argmax(-1) for p in (loaded, done.params))
print("the same after loading:", bool((prediction == before).all()))
print(f"{(prediction == y[test]).mean():.0%} of {len(prediction)} digits")

# for torch.nn.Sequential(Linear(64, 64), ReLU(), Linear(64, 10)).load_state_dict(safetensors.torch.load_file(...))
weights = fnbp.to_torch(net, done.params, done.state)
save_arrays(weights, folder / "torch.safetensors")
print("for PyTorch:", *weights)
