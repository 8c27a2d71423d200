"""fit on batches that come one by one: from an iterable, a loader of grain, or arrays that stay on the host."""

import gc
import itertools
import json
import os
import signal
import threading
import weakref

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
import fnbp.training.prepare
from fnbp.training import supply
from tests.test_checkpoints import same

RNG = np.random.default_rng(7)
M, BATCH, KEY = 23, 5, jax.random.key(1)  # 5 batches an epoch, the last one of 3
X, Y = RNG.standard_normal((M, 3)).astype(np.float32), RNG.integers(0, 4, M)
NET = fnbp.serial(fnbp.dense(7), fnbp.batch_norm(), fnbp.tanh(), fnbp.dropout(0.1), fnbp.dense(4))
LOSS, ADAM = fnbp.softmax_cross_entropy(), optax.adam(0.02)
PAIRS = [(X[i : i + BATCH], Y[i : i + BATCH]) for i in range(0, 20, BATCH)]


def fit(data, net=NET, **options):
    params, state = net.init(jax.random.key(0), X)
    given = {"optimizer": ADAM, "key": KEY, "progress": False, "record": fnbp.gradient_norm} | options
    if "epochs" not in options:
        given = {"steps": 12} | given
    return fnbp.fit(net, LOSS, params, state, data, **given)


def orders(epoch):
    """Other batches in each epoch."""
    return [PAIRS[i] for i in np.random.default_rng(epoch).permutation(4)]


def by_hand(batches, net=NET):
    """The same steps, without fit."""
    params, state = net.init(jax.random.key(0), X)
    opt_state, losses, (_, key) = ADAM.init(params), [], jax.random.split(KEY)
    gradient = jax.jit(fnbp.value_and_grad(net, LOSS))
    for step, (x, y) in enumerate(batches):
        ctx = fnbp.Context(jax.random.fold_in(key, step), train=True)
        (J, state), grads = gradient(params, state, jnp.asarray(x), jnp.asarray(y), ctx)
        updates, opt_state = ADAM.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(J))
    return np.asarray(losses)


# --- what is computed ---


def test_each_batch_of_an_iterable_is_a_step():
    found = fit(fnbp.Stream(PAIRS), steps=10)
    np.testing.assert_allclose(found.history.loss, by_hand(itertools.islice(itertools.cycle(PAIRS), 10)), rtol=2e-5)
    found = fit(fnbp.Stream(orders, epoch=4), steps=10)
    due = by_hand([*orders(0), *orders(1), *orders(2)[:2]])
    np.testing.assert_allclose(found.history.loss, due, rtol=2e-5)


class Loader:
    """An iterable that begins again, as loaders do."""

    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        return iter(PAIRS)


class Sized(Loader):
    def __len__(self):
        return 4


@pytest.mark.parametrize("data", [Loader(), Sized(), lambda: (pair for pair in itertools.cycle(PAIRS))])
def test_whatever_begins_again_is_passed_through_again(data):
    data = data() if not isinstance(data, Loader) else data
    same(fit(data), fit(fnbp.Stream(PAIRS)), but=("seconds", "validation_step"))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("steps", [3, 12])
def test_arrays_on_the_host_are_trained_on_as_those_on_the_device(tmp_path, drop_last, steps):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    there = fit(fnbp.Batches(mapped, Y, BATCH, drop_last, host=True), steps=steps, validation=(X, Y))
    here = fit(fnbp.Batches(X, Y, BATCH, drop_last), steps=steps, validation=(X, Y))
    np.testing.assert_allclose(there.history.loss, here.history.loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(there[:3]), jax.tree.leaves(here[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert there.history.validation_step.tolist() == here.history.validation_step.tolist()


def test_a_short_batch_is_filled_up_with_examples_that_do_not_count():
    net = fnbp.models.mlp(7, 4)
    short = [*PAIRS[:2], (X[20:], Y[20:]), PAIRS[3]]
    found = fit(fnbp.Stream(short), net, steps=8)
    np.testing.assert_allclose(found.history.loss, by_hand(short + short, net), rtol=2e-5)


def test_bytes_become_numbers_on_the_device():
    pixels = RNG.integers(0, 256, (M, 3)).astype(np.uint8)

    def scaled(key, batch):
        x, y = batch
        return x / jnp.float32(255), y

    raw = [(pixels[i : i + BATCH], Y[i : i + BATCH]) for i in range(0, 20, BATCH)]
    ready = [(x / np.float32(255), y) for x, y in raw]
    found = fit(fnbp.Stream(raw, augment=scaled)).history.loss
    np.testing.assert_allclose(found, fit(fnbp.Stream(ready)).history.loss, rtol=1e-5)
    found = fit(fnbp.Batches(pixels, Y, BATCH, augment=scaled, host=True)).history.loss
    due = fit(fnbp.Batches(pixels / np.float32(255), Y, BATCH)).history.loss
    np.testing.assert_allclose(found, due, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 3])
def test_chunks_change_nothing(monkeypatch, most):
    whole = fit(fnbp.Stream(PAIRS))
    monkeypatch.setattr(supply, "CHUNK_BATCHES", most)
    same(fit(fnbp.Stream(PAIRS)), whole)


def test_epochs_are_passes_unless_told():
    seen = []
    fit(fnbp.Stream(PAIRS), epochs=2, on_epoch=lambda so_far: seen.append(so_far.step))
    fit(fnbp.Stream(PAIRS, epoch=3), epochs=2, on_epoch=lambda so_far: seen.append(so_far.step))
    assert seen == [4, 8, 3, 6]
    endless = fnbp.Stream(itertools.cycle(PAIRS), epoch=5)
    assert fit(endless, steps=12, validation=(X, Y)).history.validation_step.tolist() == [5, 10, 12]
    found = fit(fnbp.Stream(itertools.cycle(PAIRS)), steps=12, validation=(X, Y))
    assert found.history.validation_step.tolist() == [12]


def test_held_out_data_may_come_in_batches():
    held = fnbp.Validation([(X[:9], Y[:9]), (X[9:], Y[9:])], metrics=fnbp.accuracy())
    found, due = fit(fnbp.Stream(PAIRS), validation=held), fit(fnbp.Stream(PAIRS), validation=(X, Y))
    np.testing.assert_allclose(found.history.validation_loss, due.history.validation_loss, rtol=1e-5)
    assert len(found.history.metrics["accuracy"]) == 3


def test_a_second_fit_compiles_nothing(monkeypatch):
    make, loops = fnbp.training.prepare.compiled_loop, []

    def capture(*args):
        loops.append(make(*args))
        return loops[-1]

    monkeypatch.setattr(fnbp.training.prepare, "compiled_loop", capture)
    for steps in (3, 7, 12):
        fit(fnbp.Stream(PAIRS), steps=steps)
    assert [loop._cache_size() for loop in loops] == [1, 0]  # for whole batches, and for others


# --- going on ---


@pytest.mark.parametrize("first", [1, 4, 6])
@pytest.mark.parametrize("kind", ["list", "function", "endless", "host"])
def test_two_pieces_are_one(tmp_path, kind, first):
    make = {
        "list": lambda: fnbp.Stream(PAIRS),
        "function": lambda: fnbp.Stream(orders, epoch=4),
        "endless": lambda: fnbp.Stream(itertools.cycle(PAIRS), epoch=4),
        "host": lambda: fnbp.Batches(X, Y, BATCH, host=True),
    }[kind]
    whole = fit(make(), steps=11)
    fit(make(), steps=first, checkpoint=tmp_path)
    same(fit(make(), steps=11, checkpoint=tmp_path), whole)
    data = make()  # in one process an iterator goes on where it is
    before = fit(data, steps=first)
    after = resumed(data, before, 11 - first)
    for a, b in zip(jax.tree.leaves(after[:3]), jax.tree.leaves(whole[:3]), strict=True):
        assert np.array_equal(a, b)


def resumed(data, before, steps):
    return fnbp.fit(
        NET, LOSS, before.params, before.state, data, optimizer=ADAM, key=KEY, progress=False, steps=steps,
        resume=before, record=fnbp.gradient_norm,
    )  # fmt: skip


def grains(seed=0):
    data = grain.MapDataset.source(list(zip(X[:20], Y[:20], strict=True))).seed(seed).shuffle().repeat()
    return data.batch(BATCH, drop_remainder=True).to_iter_dataset()


@pytest.mark.parametrize("first", [3, 8])
def test_an_iterator_that_knows_its_place_is_set(tmp_path, monkeypatch, first):
    monkeypatch.setattr(supply, "CHUNK_BATCHES", 4)
    whole = fit(fnbp.Stream(grains()), steps=15)
    assert len(np.unique(whole.history.loss)) == 15
    fit(fnbp.Stream(grains()), steps=first, checkpoint=tmp_path)
    drawn = []

    class Counted:
        def __iter__(self):
            return CountedIterator(iter(grains()))

    class CountedIterator:
        def __init__(self, inner):
            self.inner = inner

        def __iter__(self):
            return self

        def __next__(self):
            drawn.append(1)
            return next(self.inner)

        def get_state(self):
            return self.inner.get_state()

        def set_state(self, state):
            self.inner.set_state(state)

    same(fit(fnbp.Stream(Counted()), steps=15, checkpoint=tmp_path), whole)
    assert len(drawn) == 1 + 15 - first  # the one that is looked at first, too


def test_the_place_is_json(tmp_path):
    fit(fnbp.Stream(grains()), steps=3, checkpoint=tmp_path)
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.parent.name == "meta"]
    (meta,) = [json.loads(text) for text in texts if "position" in text]
    assert meta["position"]["at"] == 3 and meta["position"]["state"]["json"]


def numbered(n):
    """Batches that all differ."""
    return [(X[:5] + np.float32(0.1 * i), Y[i % 4 : i % 4 + 5]) for i in range(n)]


@pytest.mark.parametrize("most", [1, 4, 128])
@pytest.mark.parametrize("end", ["threshold", "asked", "error", "non-finite"])
def test_what_an_iterator_had_yielded_is_not_lost(monkeypatch, end, most):
    monkeypatch.setattr(supply, "CHUNK_BATCHES", most)
    whole = fit(fnbp.Stream(iter(numbered(24)), epoch=4), steps=24).history.loss
    optimizer, options = ADAM, {}
    if end == "threshold":
        options["threshold"] = float(np.sort(whole[:9])[0])
    if end == "asked":
        options["on_epoch"] = lambda so_far: so_far.step >= 8
    if end == "error":
        options["on_epoch"] = lambda so_far: 1 / (so_far.step < 8)
    if end == "non-finite":
        blow = optax.GradientTransformation(
            lambda params: jnp.zeros((), jnp.int32),
            lambda updates, n, params=None: (
                jax.tree.map(lambda u: u * jnp.where(n == 7, jnp.inf, 1), updates),
                jnp.add(n, 1),
            ),
        )
        optimizer = optax.chain(optax.sgd(0.1), blow)
    data = fnbp.Stream(iter(numbered(24)), epoch=4)
    try:
        before = fit(data, steps=24, optimizer=optimizer, **options)
    except ZeroDivisionError as error:
        before = error.fit
    assert 0 < before.step < 24 and before.ahead
    left = [x for x, _ in numbered(24)[before.step :]]
    for batch, x in zip(before.ahead, left, strict=False):
        assert np.array_equal(batch.x, x)
    if end == "non-finite":
        return
    after = resumed(data, before, 24 - before.step)
    assert np.array_equal(after.history.loss, whole[before.step :]) and after.ahead == ()


def test_what_an_iterator_had_yielded_does_not_go_into_another_loader():
    before = fit(fnbp.Stream(itertools.cycle(numbered(9)), epoch=2), epochs=9, on_epoch=lambda so_far: True)
    assert before.step == 2 and before.ahead
    found, due = (resumed(fnbp.Stream(PAIRS), one, 5).history.loss for one in (before, before._replace(ahead=())))
    assert np.array_equal(found, due)


@pytest.mark.parametrize("at", [8, 6])
def test_a_loader_that_shuffles_by_a_seed_of_its_own_is_passed_through_again(tmp_path, at):
    class Shuffled:
        def __init__(self):
            self.rng = np.random.default_rng(0)

        def __len__(self):
            return 4

        def __iter__(self):
            return iter([PAIRS[i] for i in self.rng.permutation(4)])

    whole = fit(fnbp.Stream(Shuffled()), steps=16)
    fit(fnbp.Stream(Shuffled()), steps=at, checkpoint=tmp_path)
    same(fit(fnbp.Stream(Shuffled()), steps=16, checkpoint=tmp_path), whole)


def test_a_loader_may_write_its_next_batch_over_the_last():
    def each():
        x, y = np.empty((5, 3), np.float32), np.empty(5, int)
        for pair in itertools.cycle(PAIRS):
            x[:], y[:] = pair
            yield x, y

    same(fit(fnbp.Stream(each())), fit(fnbp.Stream(itertools.cycle(PAIRS))))


def test_the_order_of_arrays_on_the_host_is_that_of_the_settings_outside():
    with jax.threefry_partitionable(False):
        found = fit(fnbp.Batches(X, Y, BATCH, host=True), fnbp.models.mlp(7, 4), steps=9)
        due = fit(fnbp.Batches(X, Y, BATCH), fnbp.models.mlp(7, 4), steps=9)
    other = fit(fnbp.Batches(X, Y, BATCH), fnbp.models.mlp(7, 4), steps=9)
    np.testing.assert_allclose(found.history.loss, due.history.loss, rtol=1e-5)
    assert abs(other.history.loss / due.history.loss - 1).max() > 1e-3


class Placed:
    """An iterator that tells its place in a dict, which it writes over."""

    def __init__(self, told=lambda at: at):
        self.at, self.told = {"at": 0}, told

    def __iter__(self):
        return self

    def __next__(self):
        self.at["at"] += 1
        return numbered(40)[self.at["at"] - 1]

    def get_state(self):
        return self.told(self.at)

    def set_state(self, state):
        self.at = dict(state)


def test_a_place_is_kept_as_it_was_when_it_was_told(tmp_path):
    whole = fit(fnbp.Stream(Placed()), steps=24)
    fit(fnbp.Stream(Placed()), steps=24, threshold=float(np.sort(whole.history.loss[:9])[0]), checkpoint=tmp_path)
    same(fit(fnbp.Stream(Placed()), steps=24, checkpoint=tmp_path), whole)


def test_a_place_that_is_not_json_is_refused(tmp_path):
    bad = Placed(lambda at: {1, 2})
    with pytest.raises(TypeError, match="get_state of the iterator must return bytes, or what JSON has"):
        fit(fnbp.Stream(bad), checkpoint=tmp_path)
    assert fit(fnbp.Stream(bad)).step == 12  # without a checkpoint no one asks


def test_a_refused_request_takes_no_batch():
    iterator = iter(PAIRS)
    for wrong in ({"epochs": 1}, {"steps": 0}, {"steps": 3, "validation": (X * np.nan, Y)}, {"steps": 2, "start": -1}):
        with pytest.raises(ValueError, match="fit: "):
            fit(fnbp.Stream(iterator), **wrong)
    assert len(list(iterator)) == 4


# --- what goes wrong ---


def test_the_batches_before_one_that_fails_are_trained_on():
    def each():
        yield from numbered(300)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone") as caught:
        fit(fnbp.Stream(each()), steps=301)
    assert caught.value.fit.step == 300


def test_a_batch_that_makes_no_finite_loss_is_looked_at_and_told():
    found = fit(fnbp.Stream([*PAIRS, (X[:5], Y[:5] + 9)]), steps=5)
    assert (found.stopped, found.step) == ("non-finite", 4)
    assert "step 5 is not finite, its loss is nan; these parameters are of step 4; softmax_cross_entropy: label 9" in (
        found.message
    )


@pytest.mark.parametrize(
    "x, y, words",
    [
        (X[:5], np.full(5, 2**40), r"fit: batch 4: y holds 1099511627776 at index \[0\], which int32 does not hold"),
        (
            np.full((5, 3), 1e300),
            Y[:5],
            r"fit: batch 4: x holds 1e\+300 at index \[0, 0\], which float32 does not hold",
        ),
    ],
)
def test_a_number_that_the_device_does_not_hold_is_told(x, y, words):
    first = [(a.astype(x.dtype), b.astype(y.dtype)) for a, b in PAIRS]
    with pytest.raises(ValueError, match=words) as caught:
        fit(fnbp.Stream([*first, (x, y)]), steps=8)
    assert caught.value.fit.step == 4


def test_half_precision_that_is_not_finite_is_told():
    half = [(x.astype(jnp.bfloat16), y) for x, y in PAIRS]
    half[2] = half[2][0] * np.asarray(np.nan, jnp.bfloat16), half[2][1]
    with pytest.raises(ValueError, match=r"fit: batch 2: x holds nan at index \(0, 0\)"):
        net = fnbp.cast(fnbp.models.mlp(7, 4), "bfloat16")
        params, state = net.init(jax.random.key(0), jnp.asarray(half[0][0]))
        fnbp.fit(net, LOSS, params, state, fnbp.Stream(half), optimizer=ADAM, key=KEY, steps=4, progress=False)


@pytest.mark.parametrize(
    "held, error, words",
    [
        (iter(PAIRS), TypeError, "fit: validation is an iterator, .* which begins only once"),
        ([(X * np.nan, Y)], ValueError, "fit: validation batch 0: x has 69 non-finite values"),
        ([(X, Y + 9)], ValueError, "label 9 at index"),
        ([(X[:, :2], Y)], ValueError, r"dense\(7\)"),
        ([X], TypeError, r"fit: validation: batch 0 must be a pair \(x, y\)"),
    ],
)
def test_held_out_batches_are_looked_at_before_the_first_step(held, error, words):
    with pytest.raises(error, match=words) as caught:
        fit(fnbp.Stream(PAIRS), fnbp.models.mlp(7, 4), validation=fnbp.Validation(held))
    assert not hasattr(caught.value, "fit")


def test_a_later_held_out_batch_that_is_not_finite_is_told():
    with pytest.raises(ValueError, match="fit: validation batch 1: x has 69 non-finite values") as caught:
        fit(fnbp.Stream(PAIRS), validation=fnbp.Validation([(X, Y), (X * np.nan, Y)]))
    assert caught.value.fit.step == 4


def test_ctrl_c_ends_a_long_way_to_the_first_batch(tmp_path, monkeypatch):
    fit(fnbp.Stream(itertools.cycle(PAIRS)), steps=9, checkpoint=tmp_path)
    gate = threading.Event()

    def slow():
        yield from PAIRS
        os.kill(os.getpid(), signal.SIGINT)
        gate.wait(20)
        yield from itertools.cycle(PAIRS)

    monkeypatch.setattr(supply, "CLOSE_SECONDS", 0.1)
    found = fit(fnbp.Stream(slow()), steps=20, checkpoint=tmp_path)
    gate.set()
    assert (found.stopped, found.step) == ("interrupt", 9)


def broken(at, pair):
    return [*(PAIRS * 3)[:at], pair, *PAIRS]


@pytest.mark.parametrize(
    "pair, error, words",
    [
        ((X[:5] * np.nan, Y[:5]), ValueError, r"fit: batch 6: x holds nan at index \(0, 0\)"),
        (
            (X[:5, :2], Y[:5]),
            ValueError,
            r"fit: batch 6 holds float32 \(2,\), int64 \(\) for each example; the first .*3",
        ),
        ((X[:5].astype(float), Y[:5]), ValueError, r"fit: batch 6 holds float64"),
        ((X[:7], Y[:7]), ValueError, "fit: batch 6 has 7 examples, more than the first, which had 5"),
        ((X[:5], Y[:4]), ValueError, r"fit: batch 6 needs equally many examples in x and y, .* \[\(4,\), \(5,\)\]"),
        (X[:5], TypeError, r"fit: batch 6 must be a pair \(x, y\), got float32"),
        ((X[:5], Y[:5], Y[:5]), TypeError, r"fit: batch 6 must be a pair \(x, y\), got a tuple of 3"),
        (({"a": X[:5]}, Y[:5]), ValueError, "fit: batch 6 holds"),
    ],
)
def test_a_batch_that_does_not_fit_is_named_and_nothing_is_lost(tmp_path, pair, error, words):
    with pytest.raises(error, match=words) as caught:
        fit(fnbp.Stream(broken(6, pair)), steps=20, checkpoint=tmp_path)
    assert caught.value.fit.step == 6
    assert fit(fnbp.Stream(PAIRS * 3), steps=20, checkpoint=tmp_path).step == 20


def test_what_the_iterable_raises_says_where():
    def each():
        yield from PAIRS
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit(fnbp.Stream(each()), steps=20)
    assert caught.value.fit.step == 4
    assert "fit: raised by the iterable of batches, at batch 4" in caught.value.__notes__


@pytest.mark.parametrize(
    "data, words",
    [
        (lambda: fnbp.Stream(iter(PAIRS)), "the iterator ended after 4 batches, and more steps were asked for"),
        (lambda: fnbp.Stream(Lying()), "epoch 0 ended after 4 batches, expected 6"),
        (lambda: fnbp.Stream(lambda epoch: PAIRS[: 4 - epoch], epoch=4), "epoch 1 ended after 3 batches, expected 4"),
    ],
)
def test_an_iterable_that_ends_early_is_told(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        fit(data(), steps=10)
    assert caught.value.fit.step >= 4


class Lying(Loader):
    def __len__(self):
        return 6


@pytest.mark.parametrize(
    "data, options, error, words",
    [
        (fnbp.Stream([]), {}, ValueError, "epoch 0 of the iterable has no batch"),
        (fnbp.Stream(Loader), {}, TypeError, r"Stream holds the class Loader; make one: Loader\(...\)"),
        (fnbp.Stream(3), {}, TypeError, r"Stream needs an iterable of batches \(x, y\), got int 3"),
        (fnbp.Stream(X), {}, TypeError, "arrays go into Batches"),
        (fnbp.Stream((X, Y)), {}, TypeError, "arrays go into Batches"),
        (
            fnbp.Stream(lambda: PAIRS),
            {},
            TypeError,
            r"Stream: a function of batches takes the epoch, .* function <lambda>",
        ),
        (fnbp.Stream(PAIRS, epoch=0), {}, ValueError, "epoch must be at least 1"),
        (fnbp.Stream(PAIRS, augment=3), {}, TypeError, "augment must be a function"),
        (fnbp.Stream(PAIRS), {"y": Y}, ValueError, "the batches of a stream hold y"),
        (fnbp.Stream(PAIRS), {"batch_size": 5}, ValueError, "the batches of a stream hold y"),
        (
            fnbp.Stream(lambda epoch: 3),
            {},
            TypeError,
            r"batches\(epoch\) must return an iterable of batches, got int 3",
        ),
        (fnbp.Stream(itertools.cycle(PAIRS)), {"epochs": 2}, ValueError, "epochs needs to know how many batches"),
        (fnbp.Stream(Loader()), {"on_epoch": print}, ValueError, "on_epoch needs to know how many batches an epoch"),
        (fnbp.Stream(Loader()), {"patience": 2, "validation": (X, Y)}, ValueError, "patience needs to know"),
        (fnbp.Stream([(X[:5], Y[:5] + 9)]), {}, ValueError, "label 9 at index"),
        (fnbp.Stream([(X[:5, :0], Y[:5])]), {}, ValueError, "dense"),
        (fnbp.Batches(X, Y, 50, host=True), {}, ValueError, "batch_size 50 is more than the 23 examples"),
        (fnbp.Batches(X, Y[:9], 5, host=True), {}, ValueError, "expected equally many examples"),
        (fnbp.Batches(X, Y, 5, host=3), {}, TypeError, "host must be a bool"),
        (fnbp.Batches([1, 2], Y, 5, host=True), {}, TypeError, "expected arrays with the examples as first axis"),
    ],
)
def test_what_is_refused(data, options, error, words):
    with pytest.raises(error, match=words):
        fit(data, **options)


def test_ctrl_c_ends_a_wait_for_a_loader_that_hangs(monkeypatch):
    gate, trained, out = threading.Event(), threading.Event(), []

    def each():
        yield from PAIRS
        trained.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        out.append(gate.wait(60))
        yield PAIRS[0]

    monkeypatch.setattr(supply, "CLOSE_SECONDS", 0.1)
    found = fit(fnbp.Stream(each()), steps=20, callback=lambda step, loss: trained.set() if step == 4 else None)
    assert (found.stopped, found.step) == ("interrupt", 4) and not out  # the loader hangs still
    gate.set()


def test_nothing_of_a_stream_is_kept_behind_a_fit():
    class Owner:
        def __iter__(self):
            return itertools.cycle(PAIRS)

    owner = Owner()
    seen = weakref.ref(owner)
    fit(fnbp.Stream(owner), steps=5)
    del owner
    gc.collect()
    assert seen() is None
    assert not [one for one in threading.enumerate() if one.name == "fnbp batches"]


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("host", [False, True], ids=["stream", "host"])
def test_batches_lie_over_the_devices_of_a_mesh(explicit, host):
    net, x, y = fnbp.models.mlp(8, 4), X[:22].repeat(2, 0), Y[:22].repeat(2)
    mesh = fnbp.sharding.mesh(4, explicit=explicit)
    pairs = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 44, 8)]  # the last one of 4

    def run(place):
        params, state = net.init(jax.random.key(0), x)
        if place:
            params = fnbp.sharding.place(net, params, mesh, fully=True)
        data = fnbp.Batches(x, y, 8, host=True) if host else fnbp.Stream(pairs)
        return fnbp.fit(net, LOSS, params, state, data, optimizer=ADAM, key=KEY, steps=13, progress=False)

    found, due = run(True), run(False)
    np.testing.assert_allclose(found.history.loss, due.history.loss, rtol=1e-5)
    with pytest.raises(ValueError, match=r"fit: batch_size 6 cannot be split over 4 devices along 'data'"):
        params, state = net.init(jax.random.key(0), x)
        params = fnbp.sharding.place(net, params, mesh)
        fnbp.fit(net, LOSS, params, state, fnbp.Stream([(x[:6], y[:6])]), optimizer=ADAM, key=KEY, steps=1)
