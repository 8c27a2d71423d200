"""predict, evaluate and the metrics: against NumPy, batch by batch, and what they refuse."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnbp
from tests.test_models import MODELS

RNG = np.random.default_rng(3)
N, K = 103, 5
X = RNG.standard_normal((N, 3)).astype(np.float32)
Y = RNG.integers(0, K, N)
NET, LOSS = fnbp.models.mlp(7, K), fnbp.softmax_cross_entropy()
PARAMS, STATE = NET.init(jax.random.key(0), X)
SCORES = np.asarray(fnbp.apply(NET, PARAMS, STATE, X))
GPT = MODELS["gpt"][0]
ALL = [fnbp.accuracy(), fnbp.top_k(2), fnbp.perplexity(), fnbp.confusion(K)]


def measured(metrics=None, x=X, y=Y, **options):
    return fnbp.evaluate(NET, LOSS, PARAMS, STATE, x, y, metrics=metrics, **options)


def judged(metric, prediction, target, mask=None, losses=None):
    """What a metric makes of one batch."""
    prediction, target = jnp.asarray(prediction), jnp.asarray(target)
    m = len(prediction)
    losses = jnp.zeros(m) if losses is None else losses
    return np.asarray(metric.finish(metric.total(prediction, target, losses, mask), m, 0.0))


@pytest.mark.parametrize("batch_size", [1, 10, 103, 1024])
def test_predictions_do_not_depend_on_the_batch(batch_size):
    found = fnbp.predict(NET, PARAMS, STATE, X, batch_size=batch_size)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, SCORES, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_predicts_what_it_computes(name):
    net, x, y = MODELS[name]
    params, state = net.init(jax.random.key(0), x)
    if any(layer.traits.mixes == "training" for _, layer in fnbp.layer.leaves(net)):
        state = fnbp.value_and_grad(net, LOSS)(params, state, x, y, fnbp.Context(jax.random.key(1), train=True))[0][1]
    due = fnbp.apply(net, params, state, jax.tree.map(jnp.asarray, x))
    np.testing.assert_allclose(fnbp.predict(net, params, state, x, batch_size=3), due, atol=1e-5)
    found = fnbp.evaluate(net, LOSS, params, state, x, y, metrics=fnbp.accuracy(reduce="tokens"), batch_size=3)
    losses, _ = LOSS.forward(due, jnp.asarray(y))
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((np.asarray(due).argmax(-1) == y).mean()))


def test_a_net_of_two_outputs_predicts_both():
    both = fnbp.parallel(fnbp.dense(2), fnbp.tanh(), join="tuple")
    params, state = both.init(jax.random.key(0), X)
    one, other = fnbp.predict(both, params, state, X, batch_size=10)
    assert one.shape == (N, 2) and other.shape == X.shape


@pytest.mark.parametrize("batch_size", [1, 10, 103, 1024])
def test_figures_are_those_of_numpy(batch_size):
    found = measured(ALL, batch_size=batch_size)
    p = SCORES.astype(float)
    log = p - p.max(-1, keepdims=True)
    log -= np.log(np.exp(log).sum(-1, keepdims=True))
    J = -log[np.arange(N), Y].mean()
    table = np.zeros((K, K), int)
    np.add.at(table, (Y, p.argmax(-1)), 1)
    assert found["loss"] == pytest.approx(J, rel=1e-6)
    assert found["accuracy"] == pytest.approx((p.argmax(-1) == Y).mean())
    assert found["top_2"] == pytest.approx((np.argsort(-p, -1)[:, :2] == Y[:, None]).any(-1).mean())
    assert found["perplexity"] == pytest.approx(np.exp(J), rel=1e-6)
    np.testing.assert_array_equal(found["confusion"], table)


def test_an_iterable_of_batches_is_measured_as_the_arrays():
    pairs = [(X[:60], Y[:60]), (X[60:], Y[60:])]
    found = fnbp.evaluate(NET, LOSS, PARAMS, STATE, iter(pairs), metrics=ALL)
    for name, due in measured(ALL).items():
        np.testing.assert_allclose(found[name], due, rtol=1e-6)


def test_a_file_is_measured_where_it_lies(tmp_path):
    np.save(tmp_path / "x.npy", X)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert measured(x=x, batch_size=10)["loss"] == pytest.approx(measured()["loss"])
    np.testing.assert_allclose(fnbp.predict(NET, PARAMS, STATE, x, batch_size=10), SCORES, atol=1e-6)


def test_a_function_is_a_metric_by_its_mean():
    def entropy(prediction, target):
        log = jax.nn.log_softmax(prediction)
        return -(jnp.exp(log) * log).sum(-1)

    found = measured(entropy, batch_size=10)
    assert found["entropy"] == pytest.approx(float(entropy(jnp.asarray(SCORES), Y).mean()), rel=1e-5)
    assert list(measured({"mine": entropy, "right": fnbp.accuracy()})) == ["loss", "mine", "right"]


def test_measuring_again_compiles_nothing():
    traced = []

    def seen(prediction, target):
        traced.append(1)
        return prediction[:, 0]

    for _ in range(3):
        measured([seen, fnbp.accuracy()])
    assert len(traced) == 1


def test_positions_that_do_not_count_are_left_out():
    p = RNG.standard_normal((4, 6, K))
    t = RNG.integers(0, K, (4, 6))
    t[0, 2:] = -1
    right = p.argmax(-1) == t
    kept = t != -1
    by_example = np.mean([row[counts].mean() for row, counts in zip(right, kept, strict=True)])
    assert judged(fnbp.accuracy(ignore_index=-1), p, t) == pytest.approx(by_example)
    assert judged(fnbp.accuracy(ignore_index=-1, reduce="tokens"), p, t) == pytest.approx(right[kept].mean())
    assert judged(fnbp.top_k(K, ignore_index=-1, reduce="tokens"), p, t) == 1
    assert judged(fnbp.confusion(K, ignore_index=-1), p, t).sum() == kept.sum()
    mask = jnp.asarray(kept)
    t[0, 2:] = 0
    assert judged(fnbp.accuracy(reduce="tokens"), p, t, mask) == pytest.approx(right[kept].mean())
    assert judged(fnbp.confusion(K), p, t, mask).sum() == kept.sum()


def test_distributions_and_yes_or_no():
    hot = np.eye(K)[Y]
    assert measured(fnbp.accuracy(), y=hot)["accuracy"] == measured(fnbp.accuracy())["accuracy"]
    np.testing.assert_array_equal(
        measured(fnbp.confusion(K), y=hot)["confusion"], measured(fnbp.confusion(K))["confusion"]
    )
    scores, yes = RNG.standard_normal((N, 3)), RNG.integers(0, 2, (N, 3)).astype(float)
    assert judged(fnbp.accuracy(threshold=0), scores, yes) == pytest.approx(((scores > 0) == (yes > 0)).mean())


def test_nan_is_never_right():
    p = np.full((3, K), np.nan)
    for metric in (fnbp.accuracy(), fnbp.top_k(1), fnbp.top_k(K - 1)):
        assert judged(metric, p, np.arange(3)) == 0


IDENTITY = fnbp.identity()


def of_scores(scores, target, metrics=None, loss=LOSS, **options):
    return fnbp.evaluate(IDENTITY, loss, {}, {}, scores, target, metrics=metrics, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32])
def test_labels_of_few_bits_are_counted_right(dtype):
    scores, labels = 9 * np.eye(20, dtype=np.float32), np.arange(20, dtype=dtype)
    np.testing.assert_array_equal(of_scores(scores, labels, fnbp.confusion(np.int8(20)))["confusion"], np.eye(20))
    assert of_scores(scores, labels, fnbp.top_k(1))["top_1"] == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_half_precision_is_added_up_in_float32(dtype, batch_size):
    x = jnp.asarray(8 * np.random.default_rng(0).standard_normal((1000, 3)), dtype)
    found = of_scores(x, 0 * x, [fnbp.perplexity()], fnbp.loss_from_jax(optax.l2_loss), batch_size=batch_size)
    due = np.mean(np.asarray(x, np.float32) ** 2 / 2)
    assert found["loss"] == pytest.approx(due, rel=2e-2) and found["perplexity"] == pytest.approx(np.exp(found["loss"]))


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_a_loss_over_tokens_does_not_depend_on_the_batch(batch_size):
    rng = np.random.default_rng(0)
    t, p = rng.integers(0, 4, (40, 6)), rng.standard_normal((40, 6, 4)).astype(np.float32)
    t[:20, 1:], p[20:] = -1, 5 * p[20:]
    loss = fnbp.softmax_cross_entropy(ignore_index=-1, reduce="tokens")
    log = p - np.log(np.exp(p).sum(-1, keepdims=True))
    due = -np.take_along_axis(log, np.maximum(t, 0)[..., None], -1)[..., 0][t != -1].mean()
    found = of_scores(p, t, fnbp.perplexity(), loss, batch_size=batch_size)
    assert found["loss"] == pytest.approx(due, rel=1e-5) and found["perplexity"] == pytest.approx(np.exp(due), rel=1e-4)


def test_examples_without_a_label_are_left_out():
    scores, labels = 9 * np.eye(4, dtype=np.float32), np.array([0, 1, -1, -1])
    loss = fnbp.softmax_cross_entropy(ignore_index=-1)
    for reduce in ("examples", "tokens"):
        metrics = [fnbp.accuracy(ignore_index=-1, reduce=reduce), fnbp.top_k(1, -1, reduce)]
        found = of_scores(scores, labels, metrics, loss)
        assert found["accuracy"] == found["top_1"] == 1
    binary = fnbp.binary_cross_entropy(True, ignore_index=-1)
    metric = fnbp.accuracy(threshold=0, ignore_index=-1)
    assert of_scores(np.array([[1, 1, -1.0]]), np.array([[1, -1, 0]]), metric, binary)["accuracy"] == 1


def test_classes_that_are_masked_out_may_be_minus_infinity():
    scores = np.array([[2, 1, -np.inf], [0, 1, -np.inf]], np.float32)
    found = of_scores(scores, np.array([0, 1]), [fnbp.accuracy(), fnbp.top_k(1)])
    assert found["accuracy"] == found["top_1"] == 1


def test_nan_is_in_no_column_and_on_no_side_of_a_threshold():
    nan = jnp.full((3, 4), jnp.nan)
    assert judged(fnbp.accuracy(threshold=0), nan, jnp.zeros((3, 4))) == 0
    assert judged(fnbp.confusion(4), nan, jnp.zeros(3, int)).sum() == 0


def test_top_k_neither_flatters_a_dead_net_nor_a_label_that_there_is_not():
    scores = jnp.zeros((4, 4))
    assert judged(fnbp.top_k(1), scores, jnp.arange(4)) == judged(fnbp.accuracy(), scores, jnp.arange(4)) == 0.25
    assert judged(fnbp.top_k(2), jnp.array([[3.0, 1, 2]]), jnp.array([-1])) == 0
    with pytest.raises(ValueError, match=r"top_k: k is 5, and predictions of shape .* have 4 classes"):
        judged(fnbp.top_k(5), scores, jnp.arange(4))


def test_tokens_are_looked_at_in_every_batch():
    tokens = np.zeros((10, 5), int)
    tokens[9, 0] = 99
    params, state = GPT.init(jax.random.key(0), jnp.zeros((1, 5), int))
    for run in (
        lambda: fnbp.predict(GPT, params, state, tokens, batch_size=5),
        lambda: fnbp.evaluate(GPT, LOSS, params, state, tokens, np.zeros((10, 5), int), batch_size=5),
    ):
        with pytest.raises(ValueError, match="token 99"):
            run()


def test_a_net_that_mixes_examples_is_not_cut_into_batches():
    def forward(params, state, x, ctx):
        return x - x.mean(0), state, ()

    net = fnbp.Layer(
        lambda key, x: ({}, {}), forward, lambda params, res, dy: ({}, dy - dy.mean(0)), "centred",
        traits=fnbp.Traits(mixes="always"),
    )  # fmt: skip
    assert fnbp.predict(net, {}, {}, X).shape == X.shape
    with pytest.raises(TypeError, match=r"predict: centred mixes the examples, .* give all in one, by batch_size"):
        fnbp.predict(net, {}, {}, X, batch_size=5)


def test_metrics_are_equal_and_pickle_by_their_call():
    for one, other in ((fnbp.accuracy(), fnbp.accuracy()), (fnbp.top_k(2), fnbp.top_k(k=2))):
        assert one == other and hash(one) == hash(other) and pickle.loads(pickle.dumps(one)) == one
    assert fnbp.top_k(2) != fnbp.top_k(3) and repr(fnbp.top_k(3)) == "top_k(3)"


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: measured(3), TypeError, "a metric must be a Metric"),
        (lambda: measured(fnbp.accuracy), TypeError, r"call the metric: accuracy\(\)"),
        (lambda: measured([fnbp.top_k]), TypeError, r"call the metric: top_k\(\)"),
        (lambda: measured([fnbp.accuracy(), fnbp.accuracy()]), ValueError, 'two metrics are called "accuracy"'),
        (lambda: measured({"loss": fnbp.accuracy()}), ValueError, 'two metrics are called "loss"'),
        (lambda: measured(LOSS), TypeError, "a metric must be a Metric"),
        (lambda: measured(lambda p, t: jnp.mean(p)), ValueError, r"must return one value an example, \(103,\)"),
        (lambda: measured(fnbp.confusion(4)), ValueError, "have 5 classes, not 4"),
        (lambda: measured(fnbp.accuracy(threshold=0)), ValueError, "a threshold needs the same"),
        (lambda: fnbp.accuracy("half"), TypeError, "accuracy: threshold"),
        (lambda: fnbp.accuracy(reduce="all"), ValueError, "accuracy: unknown reduce 'all'"),
        (lambda: fnbp.top_k(0), ValueError, "top_k: k must be at least 1"),
        (lambda: fnbp.confusion(2.0), TypeError, "confusion: k must be a whole number"),
        (lambda: fnbp.top_k(1, ignore_index=0.5), TypeError, "top_k: ignore_index must be a whole number"),
        (lambda: measured(y=None), ValueError, "evaluate: y is missing; give x and y, or as x"),
        (lambda: measured(x=(X, Y), y=None), ValueError, "evaluate: y is missing; .* got a tuple of 2"),
        (lambda: measured(y=Y[:5]), ValueError, r"expected equally many examples, at least 1; got \[5, 103\]"),
        (lambda: measured(x=X[:0], y=Y[:0]), ValueError, "at least 1"),
        (lambda: measured(y=Y + 1), ValueError, r"label 5 at index \(\d+,\) is outside|label 5 at index \[\d+\]"),
        (lambda: measured(y=np.where(np.arange(N) == N - 1, -3, Y), batch_size=10), ValueError, "label -3 at index"),
        (
            lambda: fnbp.predict(GPT, *GPT.init(jax.random.key(0), jnp.zeros((1, 5), int)), np.full((2, 5), 13)),
            ValueError,
            "token 13",
        ),
        (lambda: measured(x=iter([]), y=None), ValueError, "there is no batch to measure"),
        (lambda: measured(x=[X], y=None), TypeError, "batch 0 must be a pair"),
        (lambda: measured(batch_size=0), ValueError, "evaluate: batch_size must be at least 1"),
        (lambda: fnbp.predict(NET, PARAMS, STATE, X, batch_size=2.5), TypeError, "predict: batch_size"),
        (lambda: fnbp.predict(NET, PARAMS, STATE, 3), TypeError, "predict: expected arrays with the examples"),
        (lambda: fnbp.predict(NET, PARAMS, STATE, X[:0]), ValueError, "at least 1"),
        (lambda: fnbp.predict(LOSS, PARAMS, STATE, X), TypeError, "predict: net must be a Layer"),
        (lambda: fnbp.predict(NET, PARAMS, STATE, X[:, :2]), ValueError, r"dense\(7\)"),
    ],
)
def test_what_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("run", ["predict", "evaluate"])
def test_under_jit_they_say_where_they_belong(run):
    f = {
        "predict": lambda x: fnbp.predict(IDENTITY, {}, {}, x),
        "evaluate": lambda x: fnbp.evaluate(IDENTITY, LOSS, {}, {}, x, jnp.zeros(3, int)),
    }[run]
    with pytest.raises(TypeError, match=f"{run}: it runs batch by batch, outside jit and vmap; .* fnbp.apply"):
        jax.jit(f)(jnp.ones((3, 4)))
