"""Losses: forward by hand and by PyTorch, backward by jax.grad, extremes, and what they refuse."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import fnbp
from tests.cases import normal, relative
from tests.test_house import constructors, returns

CE, BCE, LOGITS = fnbp.softmax_cross_entropy(), fnbp.binary_cross_entropy(), fnbp.binary_cross_entropy(from_logits=True)
MSE, HALF = fnbp.mean_squared_error(), fnbp.half_squared_error()


class Case(NamedTuple):
    """draw: rng -> prediction, target. oracle: losses (m,) by NumPy. torch: the same, (F, prediction, target)."""

    id: str
    loss: fnbp.Loss
    draw: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    oracle: Callable
    torch: Callable


def test_every_public_loss_has_a_case():
    made = {name for name, f in constructors().items() if returns(f) == "Loss"} - {"loss_from_jax"}
    without = made - {case.loss.name for case in CASES}
    assert not without, f"add a Case for each of {sorted(without)} to CASES of tests/test_losses.py"


def own(losses):
    """The mean over an example's positions."""
    return losses.reshape(len(losses), -1).mean(1)


def by_labels(a, y):
    return own(-np.take_along_axis(special.log_softmax(a, -1), y[..., None], -1)[..., 0])


def by_distribution(a, y):
    return own(-(y * special.log_softmax(a, -1)).sum(-1))


def torch_ce(F, a, y):
    axis = a.ndim - 1
    target = y if y.ndim < a.ndim else y.movedim(axis, 1)
    return own(F.cross_entropy(a.movedim(axis, 1), target, reduction="none"))


def logits(*shape):
    return lambda rng: 3 * rng.standard_normal(shape)


def soft(rng, *shape):
    return special.softmax(rng.standard_normal(shape), -1)


def bce(p, y):
    return own(-(special.xlogy(y, p) + special.xlog1py(1 - y, -p)))


def bce_of_logits(z, y):
    return own(np.logaddexp(0, z) - y * z)


def pairs(*shape, low=-2.0, high=2.0):
    return lambda rng: (rng.uniform(low, high, shape), rng.uniform(0, 1, shape))


def over(losses, counts, reduce="examples"):
    """The mean of losses over what counts: of each example, or of the batch."""
    axes = tuple(range(1, losses.ndim))
    many = counts.sum(axes) if reduce == "examples" else counts.sum() / len(losses)
    return (losses * counts).sum(axes) / np.maximum(many, 1e-300)


def over_labels(reduce, ignored):
    def of(a, y):
        kept = y != ignored
        losses = -np.take_along_axis(special.log_softmax(a, -1), np.where(kept, y, 0)[..., None], -1)[..., 0]
        return over(losses, kept, reduce)

    return of


def torch_over(reduce, ignored):
    def of(F, a, y):
        losses = F.cross_entropy(a.movedim(-1, 1), y, reduction="none", ignore_index=ignored)
        counts = (y != ignored).double()
        many = counts.sum(1) if reduce == "examples" else counts.sum() / len(y)
        return losses.sum(1) / many

    return of


def with_z(a, y, c=0.3):
    return own(
        -np.take_along_axis(special.log_softmax(a, -1), y[..., None], -1)[..., 0] + c * special.logsumexp(a, -1) ** 2
    )


def torch_with_z(F, a, y):
    losses = F.cross_entropy(a.movedim(-1, 1), y, reduction="none") + 0.3 * a.logsumexp(-1) ** 2
    return own(losses)


WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0])


def smoothed(a, y, s=0.1, w=WEIGHTS):
    q = np.eye(a.shape[-1])[y] if y.ndim < a.ndim else y
    q = (1 - s) * q + s / a.shape[-1]
    return own(-(w * q * special.log_softmax(a, -1)).sum(-1))


def torch_smoothed(F, a, y):
    w, target = a.new_tensor(WEIGHTS), y if y.ndim < a.ndim else y.movedim(-1, 1)
    return own(F.cross_entropy(a.movedim(-1, 1), target, weight=w, label_smoothing=0.1, reduction="none"))


def bce_weighted(z, y, w=np.array([0.5, 3.0, 1.0])):
    y = 0.8 * y + 0.1
    return own(w * y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))


def torch_bce_weighted(F, z, y):
    w = z.new_tensor([0.5, 3.0, 1.0])
    return own(F.binary_cross_entropy_with_logits(z, 0.8 * y + 0.1, pos_weight=w, reduction="none"))


CASES = (
    *(
        Case(
            f"ignored_by_{reduce}",
            fnbp.softmax_cross_entropy(ignore_index=-1, reduce=reduce),
            lambda r: (logits(7, 3, 5)(r), r.integers(-1, 5, (7, 3))),
            over_labels(reduce, -1),
            torch_over(reduce, -1),
        )
        for reduce in ("examples", "tokens")
    ),
    Case(
        "weighted_and_smoothed",
        fnbp.softmax_cross_entropy(weights=WEIGHTS, label_smoothing=0.1),
        lambda r: (logits(7, 3, 5)(r), r.integers(0, 5, (7, 3))),
        smoothed,
        torch_smoothed,
    ),
    Case(
        "weighted_and_smoothed_soft",
        fnbp.softmax_cross_entropy(weights=WEIGHTS, label_smoothing=0.1),
        lambda r: (logits(7, 5)(r), soft(r, 7, 5)),
        smoothed,
        torch_smoothed,
    ),
    Case(
        "bce_weighted_and_smoothed",
        fnbp.binary_cross_entropy(from_logits=True, pos_weight=[0.5, 3.0, 1.0], label_smoothing=0.2),
        pairs(7, 3, low=-9),
        bce_weighted,
        torch_bce_weighted,
    ),
    Case(
        "bce_ignored_at_positions",
        fnbp.binary_cross_entropy(ignore_index=-1),
        lambda r: (r.uniform(0.1, 0.9, (7, 3, 2)), r.integers(-1, 2, (7, 3, 2)).astype(float)),
        lambda p, y: over(-np.log(np.where(y > 0, p, 1 - p)), y != -1),
        lambda F, p, y: (
            (F.binary_cross_entropy(p, y.clip(0), reduction="none") * (y != -1)).sum((1, 2)) / (y != -1).sum((1, 2))
        ),
    ),
    Case(
        "bce_ignored",
        fnbp.binary_cross_entropy(from_logits=True, ignore_index=-1),
        lambda r: (logits(7, 3)(r), r.integers(-1, 2, (7, 3)).astype(float)),
        lambda z, y: over(np.logaddexp(0, z) - y * z, y != -1),
        lambda F, z, y: (
            (F.binary_cross_entropy_with_logits(z, y, reduction="none") * (y != -1)).sum(1) / (y != -1).sum(1).clip(1)
        ),
    ),
    Case(
        "from_jax",
        fnbp.loss_from_jax(lambda p, t: (p - t) ** 2, "mine"),
        pairs(7, 3),
        lambda p, t: own((p - t) ** 2),
        lambda F, p, t: own(F.mse_loss(p, t, reduction="none")),
    ),
    Case(
        "z_loss",
        fnbp.softmax_cross_entropy(z_loss=0.3),
        lambda r: (logits(7, 3, 5)(r), r.integers(0, 5, (7, 3))),
        with_z,
        torch_with_z,
    ),
    Case(
        "linear",
        fnbp.linear_cross_entropy(z_loss=0.3),
        lambda r: (logits(7, 3, 5)(r), r.integers(0, 5, (7, 3))),
        with_z,
        torch_with_z,
    ),
    Case("labels", CE, lambda r: (logits(7, 11)(r), r.integers(0, 11, 7)), by_labels, torch_ce),
    Case("labels_at_positions", CE, lambda r: (logits(7, 3, 5)(r), r.integers(0, 5, (7, 3))), by_labels, torch_ce),
    Case("labels_on_a_grid", CE, lambda r: (logits(5, 2, 3, 7)(r), r.integers(0, 7, (5, 2, 3))), by_labels, torch_ce),
    Case("one_hot", CE, lambda r: (logits(7, 11)(r), np.eye(11)[r.integers(0, 11, 7)]), by_distribution, torch_ce),
    Case("soft", CE, lambda r: (logits(7, 11)(r), soft(r, 7, 11)), by_distribution, torch_ce),
    Case("soft_at_positions", CE, lambda r: (logits(7, 3, 5)(r), soft(r, 7, 3, 5)), by_distribution, torch_ce),
    Case(
        "bce",
        BCE,
        pairs(7, 3, low=0.01, high=0.99),
        bce,
        lambda F, p, t: own(F.binary_cross_entropy(p, t, reduction="none")),
    ),
    Case(
        "bce_of_one",
        BCE,
        pairs(7, low=0.01, high=0.99),
        bce,
        lambda F, p, t: F.binary_cross_entropy(p, t, reduction="none"),
    ),
    Case(
        "bce_from_logits",
        LOGITS,
        pairs(7, 3, 2, low=-9),
        bce_of_logits,
        lambda F, p, t: own(F.binary_cross_entropy_with_logits(p, t, reduction="none")),
    ),
    Case(
        "mse", MSE, pairs(7, 3), lambda p, t: own((p - t) ** 2), lambda F, p, t: own(F.mse_loss(p, t, reduction="none"))
    ),
    Case(
        "half",
        HALF,
        pairs(7, 3, 2),
        lambda p, t: ((p - t) ** 2).reshape(7, -1).sum(1) / 2,
        lambda F, p, t: F.mse_loss(p, t, reduction="none").reshape(7, -1).sum(1) / 2,
    ),
)
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def drawn(case, dtype=float):
    p, t = case.draw(np.random.default_rng(6))
    return jnp.asarray(p, dtype), jnp.asarray(t, dtype if t.dtype == float else None)


def backward(loss, p, t):
    return loss.backward(loss.forward(p, t)[1])


def run(loss, p, t):
    """Losses and delta, jitted; what the check of values has to say is said before."""
    loss.check(p, t)
    return jax.jit(lambda p, t: (loss.forward(p, t)[0], backward(loss, p, t)))(p, t)


def near(found, due) -> bool:
    return bool(np.isfinite(found).all()) and relative(found, np.asarray(due)) <= 1e-6


@functools.cache
def found(case_id):
    """In float64: losses, the manual delta and the gradient of the sum; compiled once a case."""
    case = next(case for case in CASES if case.id == case_id)
    p, t = drawn(case)
    automatic = jax.grad(lambda p: jnp.sum(case.loss.forward(p, t)[0]))
    return jax.jit(lambda p: (case.loss.forward(p, t)[0], backward(case.loss, p, t), automatic(p)))(p)


@each
def test_forward_is_the_formula_by_hand(x64, case):
    p, t = drawn(case)
    losses = found(case.id)[0]
    assert losses.shape == p.shape[:1]
    assert relative(losses, case.oracle(np.asarray(p), np.asarray(t))) <= 1e-12


@each
def test_backward_is_the_gradient_of_the_sum(x64, case):
    _, manual, automatic = found(case.id)
    assert relative(manual, automatic) <= 1e-12


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed (extra: peers)")
def test_forward_and_backward_are_pytorchs(x64):
    import torch

    for case in CASES:
        p, t = drawn(case)
        prediction = torch.tensor(np.asarray(p), requires_grad=True)
        losses = case.torch(torch.nn.functional, prediction, torch.tensor(np.asarray(t)))
        losses.sum().backward()
        expected = losses.detach().numpy(), prediction.grad.numpy()
        assert relative(found(case.id)[:2], expected) <= 1e-12, case.id


@each
def test_losses_of_bfloat16_are_float32_and_its_delta_is_bfloat16(case):
    p, t = drawn(case, jnp.float32)
    p = p.astype(jnp.bfloat16)

    @jax.jit
    def run(p):
        (low, low_res), (high, high_res) = case.loss.forward(p, t), case.loss.forward(p.astype(jnp.float32), t)
        return (low, high), (case.loss.backward(low_res), case.loss.backward(high_res))

    losses, deltas = run(p)
    assert losses[0].dtype == jnp.float32 and relative(*losses) <= 1e-6
    assert deltas[0].dtype == jnp.bfloat16 and relative(*deltas) <= 2.0**-8


def test_the_delta_at_the_documents_sigmoid_is_prediction_minus_label_over_m(x64):
    net = fnbp.serial(fnbp.dense(5), fnbp.sigmoid(), fnbp.dense(3), fnbp.sigmoid())
    rng = np.random.default_rng(2)
    x, y = normal(rng, (13, 7), float), rng.integers(0, 3, 13)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(rng, leaf.shape, leaf.dtype), shapes)
    seen = jax.jit(fnbp.trace(net, CE))(params, state, x, y)
    a2 = np.asarray(seen.prediction)
    y_hat = np.exp(a2) / np.exp(a2).sum(1, keepdims=True)
    assert relative(seen.deltas["serial[3].sigmoid"], (y_hat - np.eye(3)[y]) / 13) <= 1e-12


def test_soft_labels_that_sum_to_one_only_nearly_have_their_own_gradient(x64):
    rng = np.random.default_rng(3)
    a, y = normal(rng, (7, 5), float), jnp.asarray(soft(rng, 7, 5) * (1 + 9e-4))
    automatic = jax.grad(lambda a: jnp.sum(CE.forward(a, y)[0]))
    manual, expected = jax.jit(lambda a: (backward(CE, a, y), automatic(a)))(a)
    assert relative(manual, expected) <= 1e-12


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_softmax_cross_entropy_is_stable_at_extreme_logits(size):
    a = jnp.asarray([[size, -size, 0.0], [size, -size, 0.0], [-size, -size, -size]], jnp.float32)
    y = jnp.asarray([0, 1, 2])
    for target in (y, jax.nn.one_hot(y, 3)):
        losses, delta = run(CE, a, target)
        assert near(losses, [0, 2 * size, np.log(3)])
        expected = [[0, 0, 0], [1, -1, 0], [1 / 3, 1 / 3, -2 / 3]]
        np.testing.assert_allclose(delta, expected, atol=1e-6)


def test_a_class_ruled_out_by_minus_infinity_costs_nothing_where_its_label_is_zero():
    a, y = jnp.asarray([[-jnp.inf, 1.0, 2.0]]), jnp.asarray([[0.0, 0.25, 0.75]])
    losses, delta = run(CE, a, y)
    p = special.softmax([1.0, 2.0])
    assert near(losses, [-(0.25 * np.log(p[0]) + 0.75 * np.log(p[1]))])
    np.testing.assert_allclose(delta, [[0, p[0] - 0.25, p[1] - 0.75]], atol=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_binary_cross_entropy_of_extreme_logits_is_exact(size):
    z, y = jnp.asarray([size, size, -size, -size], jnp.float32), jnp.asarray([0.0, 1.0, 0.0, 1.0])
    losses, delta = run(LOGITS, z, y)
    assert near(losses, [size, 0, 0, size])
    assert np.asarray(delta).tolist() == [1, 0, 0, -1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64], ids=["bfloat16", "float32", "float64"])
def test_binary_cross_entropy_at_exactly_zero_and_one_is_finite_and_flat(x64, dtype):
    p, y = jnp.asarray([0, 0, 1, 1], dtype), jnp.asarray([0, 1, 0, 1], jnp.float32)
    losses, delta = run(BCE, p, y)
    eps = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)
    assert near(losses, [eps, -np.log(eps), -np.log(eps), eps])
    assert np.asarray(delta, float).tolist() == [0, 0, 0, 0]


def test_binary_cross_entropy_is_exact_down_to_eps():
    eps = float(jnp.finfo(jnp.float32).eps)
    p, y = jnp.asarray([2 * eps, 1 - 2 * eps, 2 * eps]), jnp.asarray([1.0, 0.0, 0.0])
    losses, delta = run(BCE, p, y)
    assert near(losses, [-np.log(2 * eps), -np.log(2 * eps), 2 * eps])
    assert near(delta, [-1 / (2 * eps), 1 / (2 * eps), 1])


@pytest.mark.parametrize("label", [-1, -11, 11, 40], ids=str)
def test_a_label_out_of_range_is_refused_and_under_jit_is_nan(label):
    a = normal(np.random.default_rng(0), (3, 2, 11), float)
    y = np.array([[1, 10], [4, label], [label, 0]])
    words = rf"softmax_cross_entropy: label {label} at index \[1, 1\] is outside 0..10"
    with pytest.raises(ValueError, match=words):
        CE.forward(a, jnp.asarray(y))
    losses = jax.jit(lambda a, y: CE.forward(a, y)[0])(a, y)
    assert np.isnan(losses).tolist() == [False, True, True]


def test_the_first_and_the_last_label_are_in_range():
    CE.check(jnp.ones((2, 11)), jnp.asarray([0, 10]))


@pytest.mark.parametrize(
    ("a", "y", "error", "words"),
    [
        ((7, 11), np.zeros(5, int), ValueError, r"target has shape \(5,\); prediction of shape \(7, 11\) needs "
         r"integer labels \(7,\) or distributions \(7, 11\)"),
        ((7, 11), np.zeros((7, 1), int), ValueError, r"target has shape \(7, 1\)"),
        ((7, 11), np.zeros((), int), ValueError, r"target has shape \(\)"),
        ((7, 3, 11), np.zeros(7, int), ValueError, r"target has shape \(7,\); prediction of shape \(7, 3, 11\) needs "
         r"integer labels \(7, 3\)"),
        ((7, 3, 11), np.zeros((7, 11), int), ValueError, r"target has shape \(7, 11\)"),
        ((7, 11), np.ones((1, 11)) / 11, ValueError, r"target has shape \(1, 11\)"),
        ((7, 11), np.zeros(7, np.float32), TypeError, r"labels must be integers, got float32 of shape \(7,\)"),
        ((7, 11), np.zeros(7, bool), TypeError, r"labels must be integers, got bool of shape \(7,\)"),
    ],
)  # fmt: skip
def test_softmax_cross_entropy_refuses_targets_that_do_not_fit(a, y, error, words):
    prediction = jax.ShapeDtypeStruct(a, jnp.float32)
    with pytest.raises(error, match=f"softmax_cross_entropy: {words}"):
        CE.check(prediction, y)
    with pytest.raises(error, match=f"softmax_cross_entropy: {words}"):
        CE.forward(jnp.zeros(a), jnp.asarray(y))


def test_softmax_cross_entropy_refuses_a_prediction_without_classes():
    with pytest.raises(ValueError, match=r"softmax_cross_entropy: prediction must be \(m, ..., k\), got shape \(7,\)"):
        CE.check(jax.ShapeDtypeStruct((7,), jnp.float32), np.zeros(7, int))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([0.5, 0.5, 0.002], r"sum 1.002, least 0.002"),
        ([0.5, 0.498, 0.0], r"sum 0.998, least 0"),
        ([1.25, 0.0, -0.25], r"sum 1, least -0.25"),
        ([2.0, 3.0, 1.0], r"sum 6, least 1"),
        ([0.5, np.nan, 0.5], "sum nan, least nan"),
    ],
)
def test_soft_labels_that_are_no_distribution_are_refused(row, words):
    y = np.full((5, 2, 3), 1 / 3, np.float32)
    y[3, 1] = row
    words = rf"softmax_cross_entropy: soft labels at index \[3, 1\] are not a distribution: {words}"
    with pytest.raises(ValueError, match=words):
        CE.forward(jnp.zeros((5, 2, 3)), jnp.asarray(y))


def test_soft_labels_may_sum_to_one_within_a_thousandth():
    for size in (0.9995, 1.0005):
        CE.check(jnp.zeros((2, 4)), np.full((2, 4), size / 4))


@pytest.mark.parametrize("loss", [BCE, LOGITS, MSE, HALF], ids=["bce", "bce_from_logits", "mse", "half"])
@pytest.mark.parametrize(
    ("prediction", "target"),
    [((7, 1), (7,)), ((7,), (7, 1)), ((7, 3), (1, 3)), ((7, 3), (7, 1)), ((7, 3), ()), ((), ())],
)
def test_a_target_of_another_shape_is_never_broadcast(loss, prediction, target):
    words = rf"{loss.name}: target has shape {target}, prediction {prediction}; they must be the same"
    words = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=words):
        loss.check(jax.ShapeDtypeStruct(prediction, jnp.float32), np.full(target, 0.5))
    if prediction:
        with pytest.raises(ValueError, match=words):
            loss.forward(jnp.full(prediction, 0.5), jnp.full(target, 0.5))


@pytest.mark.parametrize("loss", [CE, BCE, LOGITS, MSE, HALF], ids=["ce", "bce", "bce_from_logits", "mse", "half"])
def test_a_prediction_that_is_not_floating_is_refused(loss):
    with pytest.raises(TypeError, match=rf"{loss.name}: prediction must be a floating point array, got int32 of shape"):
        loss.check(jax.ShapeDtypeStruct((7, 3), jnp.int32), np.zeros((7, 3)))


@pytest.mark.parametrize("loss", [BCE, LOGITS], ids=["on_y_hat", "on_logits"])
@pytest.mark.parametrize("value", [-0.25, 1.25, np.nan])
def test_binary_cross_entropy_refuses_targets_outside_the_unit_interval(loss, value):
    t = np.full((5, 3), 0.5, np.float32)
    t[2, 1] = value
    words = rf"binary_cross_entropy: target {value} at index \[2, 1\] is outside \[0, 1\]$"
    with pytest.raises(ValueError, match=words):
        loss.forward(jnp.full((5, 3), 0.5), jnp.asarray(t))


@pytest.mark.parametrize("value", [-0.25, 1.25, np.nan])
def test_binary_cross_entropy_hints_at_from_logits_for_a_prediction_outside_the_unit_interval(value):
    p = np.full((5, 3), 0.5, np.float32)
    p[2, 1] = value
    words = (
        rf"binary_cross_entropy: prediction {value} at index \[2, 1\] is outside \[0, 1\]; "
        r"for logits: binary_cross_entropy\(from_logits=True\)"
    )
    with pytest.raises(ValueError, match=words):
        BCE.forward(jnp.asarray(p), jnp.full((5, 3), 0.5))


def test_the_ends_of_the_unit_interval_and_integer_targets_are_accepted():
    ends = jnp.asarray([0.0, 1.0])
    for target in (ends, ends.astype(int), ends.astype(bool)):
        BCE.check(ends, target)
        assert near(run(LOGITS, 100 * (2 * ends - 1), target)[0], [0, 0])


@pytest.mark.parametrize("loss", [CE, BCE, LOGITS, MSE, HALF], ids=["ce", "bce", "bce_from_logits", "mse", "half"])
def test_check_needs_no_more_than_the_shape_of_a_prediction(loss):
    loss.check(jax.ShapeDtypeStruct((7, 2), jnp.float32), np.full((7, 2), 0.5))


def test_soft_labels_of_bfloat16_may_be_as_far_from_one_as_bfloat16_is():
    a, y = jnp.zeros((2, 3)), jnp.asarray([[0.25, 0.25, 0.50390625], [0.25, 0.25, 0.51171875]], jnp.bfloat16)
    CE.check(a[:1], y[:1])
    with pytest.raises(ValueError, match=r"soft labels at index \[1\] are not a distribution: sum 1.01172, least 0.25"):
        CE.check(a, y)


def test_losses_have_names_and_a_loss_of_ones_own_needs_no_check():
    names = [loss.name for loss in (CE, BCE, LOGITS, MSE, HALF)]
    assert names == [
        "softmax_cross_entropy",
        "binary_cross_entropy",
        "binary_cross_entropy",
        "mean_squared_error",
        "half_squared_error",
    ]
    mine = fnbp.Loss(lambda p, t: (p, ()), lambda res: 1)
    assert mine.name == "loss" and mine.check(1, 2) is None


def test_labels_of_a_narrow_integer_type_have_the_same_gradient_for_many_classes():
    a = normal(np.random.default_rng(0), (3, 300), float)
    both = jax.jit(lambda a, y: (CE.forward(a, y)[0], backward(CE, a, y)))
    wide, unsigned = (both(a, np.array([0, 5, 255], dtype)) for dtype in (np.int32, np.uint8))
    assert relative(unsigned, wide) == 0
    losses, delta = both(a, np.array([-1, 5, 127], np.int8))
    assert np.isnan(losses).tolist() == [True, False, False]
    assert relative(delta[1:], both(a, np.array([0, 5, 127]))[1][1:]) <= 1e-6


# --- values that only jit sees, digits, options ---


BAD = [
    pytest.param(CE, jnp.zeros((3, 5)), jnp.array([0, 5, 1]), id="label_too_large"),
    pytest.param(CE, jnp.zeros((3, 5)), jnp.array([0, -1, 1]), id="negative_label"),
    pytest.param(CE, jnp.zeros((3, 2)), jnp.array([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0]]), id="sum_of_zero"),
    pytest.param(CE, jnp.zeros((3, 2)), jnp.array([[0.5, 0.5], [1.5, -0.5], [1.0, 0.0]]), id="negative_share"),
    pytest.param(BCE, jnp.full((3, 1), 0.5), jnp.array([[0.0], [1.5], [1.0]]), id="target_above_1"),
    pytest.param(BCE, jnp.array([[0.5], [1.5], [0.5]]), jnp.ones((3, 1)), id="prediction_above_1"),
    pytest.param(LOGITS, jnp.zeros((3, 1)), jnp.array([[0.0], [-0.5], [1.0]]), id="target_below_0"),
    pytest.param(MSE, jnp.zeros((3, 1)), jnp.array([[0.0], [jnp.nan], [1.0]]), id="target_of_nan"),
]


@pytest.mark.parametrize(("loss", "p", "y"), BAD)
def test_a_bad_value_that_only_jit_sees_is_nan_in_loss_and_gradient(loss, p, y):
    losses, dp = jax.jit(lambda p, y: (loss.forward(p, y)[0], backward(loss, p, y)))(p, y)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(dp).all(-1).tolist() == [False, True, False]
    assert np.isfinite(dp[::2]).all()


@pytest.mark.parametrize("z", [5.0, 10.0, 15.0, 20.0, 40.0, 80.0])
def test_confident_and_right_predictions_keep_their_digits(z):
    due = np.log1p(np.exp(-z)), -special.expit(-z)
    losses = {"binary": (LOGITS, jnp.full((1, 1), z), jnp.ones((1, 1)))}
    losses["labels"] = CE, jnp.array([[0.0, z]]), jnp.array([1])
    losses["one_hot"] = CE, jnp.array([[0.0, z]]), jnp.array([[0.0, 1.0]])
    for name, (loss, a, y) in losses.items():
        np.testing.assert_allclose(loss.forward(a, y)[0][0], due[0], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(backward(loss, a, y)[0, -1], due[1], rtol=1e-6, err_msg=name)
    y = fnbp.log_softmax().forward({}, {}, jnp.array([[0.0, z]]), fnbp.Context())[0]
    np.testing.assert_allclose(y[0, 1], -due[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: fnbp.softmax_cross_entropy(ignore_index=1.5),
            TypeError,
            "ignore_index must be a whole number or None",
        ),
        (lambda: fnbp.softmax_cross_entropy(label_smoothing=1.0), ValueError, r"label_smoothing must be in \[0, 1\)"),
        (lambda: fnbp.softmax_cross_entropy(label_smoothing=np.nan), ValueError, r"label_smoothing must be"),
        (lambda: fnbp.softmax_cross_entropy(weights=[1, -1]), ValueError, "weights must be one number or a row"),
        (lambda: fnbp.softmax_cross_entropy(weights="a"), TypeError, "weights must be numbers, got str 'a'"),
        (lambda: fnbp.softmax_cross_entropy(reduce="sum"), ValueError, "softmax_cross_entropy: unknown reduce 'sum'"),
        (lambda: fnbp.binary_cross_entropy(pos_weight=np.inf), ValueError, "pos_weight must be one number or a row"),
        (lambda: fnbp.binary_cross_entropy("yes"), TypeError, "from_logits must be a bool"),
        (lambda: fnbp.mean_squared_error("mean"), ValueError, "mean_squared_error: unknown reduce 'mean'"),
        (lambda: fnbp.loss_from_jax(MSE), TypeError, "loss_from_jax: a function .* is expected"),
        (
            lambda: fnbp.softmax_cross_entropy(weights=[1, 2]).forward(jnp.zeros((2, 3)), jnp.zeros(2, int)),
            ValueError,
            r"weights of shape \(2,\) do not fit the 3 classes of a prediction",
        ),
        (
            lambda: fnbp.loss_from_jax(lambda p, t: jnp.mean(p), "avg").forward(jnp.zeros((2, 3)), None),
            ValueError,
            r"avg: expected one loss an example, \(2, ...\), got shape \(\): the mean over the batch is taken later",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_loss_of_optax_is_a_loss_here():
    optax = pytest.importorskip("optax")
    loss = fnbp.loss_from_jax(optax.softmax_cross_entropy_with_integer_labels)
    a, y = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), jnp.float32), jnp.arange(7) % 5
    assert relative((loss.forward(a, y)[0], backward(loss, a, y)), (CE.forward(a, y)[0], backward(CE, a, y))) <= 1e-6


@pytest.mark.parametrize(
    "loss", [fnbp.softmax_cross_entropy(ignore_index=0), fnbp.softmax_cross_entropy(ignore_index=0, reduce="tokens")]
)
def test_a_batch_of_ignored_labels_has_loss_0_and_no_gradient(loss):
    a, y = jnp.full((2, 3, 5), jnp.inf), jnp.zeros((2, 3), int)
    assert not loss.forward(a, y)[0].any() and not backward(loss, a, y).any()
