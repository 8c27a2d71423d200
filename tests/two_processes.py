"""What a process of two does, for tests/test_processes.py: python -m tests.two_processes TASK RANK PORT."""

import sys
import time

import jax
import numpy as np
import optax

import fnbp

task, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)

rng = np.random.default_rng(0)
NET, LOSS = fnbp.models.mlp(6, 3), fnbp.softmax_cross_entropy()
X = rng.standard_normal((32, 4)).astype(np.float32)
Y = rng.integers(0, 3, 32)
PARAMS, STATE = NET.init(jax.random.key(0), X)
SHARED = fnbp.sharding.place(NET, PARAMS, fnbp.sharding.mesh())
HALF = slice(16 * rank, 16 * rank + 16)


def fit(params, x=X, y=Y, **options):
    given = {"optimizer": optax.adam(0.02), "key": jax.random.key(1), "progress": False}
    given |= {} if y is None else {"batch_size": 8}
    return fnbp.fit(NET, LOSS, params, STATE, x, y, **given | options)


def pairs(seconds=0.0, at=-1, wrong=False, raises=False):
    """Batches; those of this process come late, are others, or end in an error."""
    for i in range(12):
        if rank and i == at and raises:
            raise OSError("the disk is gone")
        time.sleep(seconds * rank)
        rows = slice(8 * (i % 4), 8 * (i % 4) + 8)
        yield X[rows] + np.float32(wrong and rank and i == at), Y[rows]


def told(f):
    """What f raises, in a line, or what it returns."""
    try:
        return f()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def different():
    print(told(lambda: fit(SHARED, X[HALF], Y[HALF], steps=4)))
    print(told(lambda: fit(SHARED, key=jax.random.key(rank), steps=4)))
    print(told(lambda: fit(SHARED, steps=4 + rank)))
    print(told(lambda: fit(SHARED, steps=4, batch_size=8 - 4 * rank)))
    print(told(lambda: fnbp.sharding.split(fnbp.sharding.mesh(), X + np.float32(rank))))
    print(told(lambda: fit(SHARED, steps=4, validation=(X[HALF], Y[HALF]))))
    print(told(lambda: fit(SHARED, fnbp.Stream(pairs(at=3, wrong=True)), None, steps=8)))


def one_asks():
    asked = fit(SHARED, epochs=3, on_epoch=lambda so_far: rank == 1)
    print(asked.stopped, asked.step)
    print(told(lambda: fit(SHARED, epochs=3, on_epoch=lambda so_far: 1 // (1 - rank))))
    print(told(lambda: fit(SHARED, steps=3, callback=lambda step, J: 1 // (1 - rank))))
    print(told(lambda: fit(SHARED, fnbp.Stream(pairs(at=5, raises=True)), None, steps=8)))


def one_is_late():
    found = fit(SHARED, fnbp.Stream(pairs(0.08)), None, steps=12)
    due = fit(PARAMS, fnbp.Stream(pairs()), None, steps=12)
    print(abs(found.history.loss - due.history.loss).max() < 1e-5)


def whole_at_last():
    split = fnbp.sharding.split(fnbp.sharding.mesh(), X)
    print(np.array_equal(fnbp.predict(NET, SHARED, STATE, split), fnbp.predict(NET, PARAMS, STATE, X)))
    spec = {"mlp[0]*.W": jax.sharding.PartitionSpec("data")}
    parts = fnbp.sharding.place(NET, PARAMS, fnbp.sharding.mesh(), patterns=spec)
    found, due = (fnbp.to_torch(NET, params, STATE) for params in (parts, PARAMS))
    print(all(np.array_equal(found[name], due[name]) for name in due))


{"different": different, "one_asks": one_asks, "one_is_late": one_is_late, "whole_at_last": whole_at_last}[task]()
