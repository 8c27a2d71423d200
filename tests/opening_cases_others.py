"""Losses to open: modules of Equinox, the losses of optax, and nets of fnbp as plain functions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from equinox.internal import while_loop
from jax.flatten_util import ravel_pytree

import fnbp
from tests.opening_case import Case, M, below, case, drawn, energy, filled, keys, np_rng

# --- Equinox ---


def of_equinox(id, build, *batch, call=lambda model, *example: model(*example), **options):
    """The energy of what a module makes, combined of its inexact arrays and the rest."""

    def make():
        params, static = eqx.partition(build(jax.random.key(0)), eqx.is_inexact_array)
        loss = lambda p, *example: energy(call(eqx.combine(p, static), *example))  # noqa: E731
        return loss, filled(params), tuple(drawn(np_rng(id), one, (M,)) for one in batch)

    return Case(id, make, **options)


def each(model, xs):
    return jax.vmap(model)(xs)


def over_time(model, xs):
    """A cell over a sequence; the state of an LSTM is a pair."""
    h = (jnp.zeros(7), jnp.zeros(7)) if isinstance(model, eqx.nn.LSTMCell) else jnp.zeros(7)
    return ravel_pytree(jax.lax.scan(lambda h, x: (model(x, h), None), h, xs)[0])[0]


def attending(model, x):
    rope = eqx.nn.RotaryPositionalEmbedding(4)
    turned = jax.vmap(rope, in_axes=1, out_axes=1)
    return model(x, x, x, process_heads=lambda q, k, v: (turned(q), turned(k), v))


def tied(key):
    pair = eqx.nn.Embedding(7, 3, key=key), eqx.nn.Linear(3, 7, use_bias=False, key=key)
    return eqx.nn.Shared(pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight)


def embedding_and_scores(model, x):
    embed, score = model()
    return jax.vmap(score)(jnp.tanh(jax.vmap(embed)(x)))


def stacked(key):
    return eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(jax.random.split(key, 5))


def in_depth(model, x):
    arrays, static = eqx.partition(model, eqx.is_array)
    return jax.lax.scan(lambda h, part: (jnp.tanh(eqx.combine(part, static)(h)), None), x, arrays)[0]


def in_use(id, build, *batch):
    """A layer with a state, which is a constant, that after one batch."""

    def make():
        examples = drawn(np_rng(id), batch[0], (M,))
        model, state = eqx.nn.make_with_state(build)(jax.random.key(0))
        state = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="m")(examples, state)[1]
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(p, x):
            return energy(eqx.nn.inference_mode(eqx.combine(p, static))(x, state)[0])

        return loss, filled(params), (examples,)

    return Case(id, make)


@eqx.filter_custom_vjp
def ruled(weight, x):
    return jnp.tanh(x @ weight)


@ruled.def_fwd
def ruled_forward(perturbed, weight, x):
    return jnp.tanh(x @ weight), None


@ruled.def_bwd
def ruled_backward(saved, d, perturbed, weight, x):
    return 2 * jnp.outer(x, d)


def checkpointed(p, x):
    """A network in the body of a loop that JAX would not differentiate in reverse."""

    def body(carry):
        n, h = carry
        return n + 1, jnp.tanh(h @ p["w"] + p["b"])

    return energy(while_loop(lambda carry: carry[0] < 3, body, (0, x), max_steps=7, kind="checkpointed")[1])


def bounded(p, x):
    return energy(while_loop(lambda h: jnp.sum(h) < 7, lambda h: h + p["w"] ** 2, x, max_steps=3, kind="bounded"))


linear = lambda key: eqx.nn.Linear(3, 7, key=key)  # noqa: E731
EQUINOX = (
    of_equinox("eqx: Linear", linear, (3,), quick=True),
    of_equinox("eqx: Linear, positions", linear, (5, 3), call=each),
    of_equinox("eqx: MLP", lambda k: eqx.nn.MLP(3, 2, 7, 2, key=k), (3,), quick=True),
    of_equinox("eqx: Conv2d", lambda k: eqx.nn.Conv2d(3, 7, (3, 2), key=k), (3, 5, 7)),
    of_equinox("eqx: Conv1d, grouped", lambda k: eqx.nn.Conv1d(4, 6, 3, stride=2, groups=2, key=k), (4, 11)),
    of_equinox("eqx: ConvTranspose1d", lambda k: eqx.nn.ConvTranspose1d(3, 7, 3, stride=2, key=k), (3, 5)),
    of_equinox("eqx: attention, rope", lambda k: eqx.nn.MultiheadAttention(2, 8, key=k), (5, 8), call=attending),
    of_equinox("eqx: GRUCell", lambda k: eqx.nn.GRUCell(3, 7, key=k), (5, 3), call=over_time),
    of_equinox("eqx: LSTMCell", lambda k: eqx.nn.LSTMCell(3, 7, key=k), (5, 3), call=over_time),
    of_equinox("eqx: LayerNorm", lambda k: eqx.nn.LayerNorm(7), (7,)),
    of_equinox("eqx: RMSNorm", lambda k: eqx.nn.RMSNorm(7), (7,)),
    of_equinox("eqx: GroupNorm", lambda k: eqx.nn.GroupNorm(2, 6), (6, 5)),
    of_equinox("eqx: WeightNorm", lambda k: eqx.nn.WeightNorm(linear(k)), (3,)),
    in_use("eqx: SpectralNorm", lambda k: eqx.nn.SpectralNorm(linear(k), "weight", key=k), (3,)),
    in_use("eqx: BatchNorm, in use", lambda k: eqx.nn.BatchNorm(3, "m", mode="ema"), (3, 7)),
    of_equinox("eqx: Embedding", lambda k: eqx.nn.Embedding(7, 3, key=k), below(7)),
    of_equinox("eqx: Shared", tied, below(7, 5), call=embedding_and_scores, quick=True),
    of_equinox("eqx: PReLU", lambda k: eqx.nn.PReLU(), (7,)),
    of_equinox(
        "eqx: AdaptiveAvgPool",
        lambda k: eqx.nn.Conv1d(3, 7, 3, key=k),
        (3, 11),
        call=lambda model, x: eqx.nn.AdaptiveAvgPool1d(2)(model(x)),
    ),
    of_equinox("eqx: Dropout", linear, (3,), keys, call=lambda model, x, key: eqx.nn.Dropout(0.5)(model(x), key=key)),
    of_equinox("eqx: stacked, scan", stacked, (3,), call=in_depth, quick=True),
    of_equinox("eqx: filter_jit", linear, (3,), call=lambda model, x: eqx.filter_jit(lambda m, x: m(x))(model, x)),
    of_equinox("eqx: filter_checkpoint", linear, (3,), call=lambda model, x: eqx.filter_checkpoint(model)(x)),
    case(
        "eqx: filter_custom_vjp", lambda p, x: energy(ruled(p["w"], x)), {"w": (3, 7)}, (3,), either=("symbolic_zeros",)
    ),
    case(
        "eqx: while_loop, checkpointed", checkpointed, {"w": (3, 3), "b": (3,)}, (3,), either=("symbolic_zeros|while",)
    ),
    case("eqx: while_loop, bounded", bounded, {"w": (3,)}, (3,), either=("symbolic_zeros|while",)),
)


# --- optax ---


def of_optax(name, loss, *targets, x=(3,)):
    """loss(prediction, *targets) of a linear net."""
    params = {"w": (3, 7), "b": (7,)}
    return case(f"optax: {name}", lambda p, x, *y: jnp.sum(loss(x @ p["w"] + p["b"], *y)), params, x, *targets)


def signs(rng, lead):
    return jnp.asarray(rng.choice([-1.0, 1.0], (*lead, 7)))


def chances(rng, lead):
    return jax.nn.softmax(jnp.asarray(rng.normal(size=(*lead, 7))))


def log_chances(rng, lead):
    return jnp.log(chances(rng, lead))


def labels(rng, lead):
    """Of sequences: none is the blank."""
    return jnp.asarray(rng.integers(1, 7, (*lead, 2)))


def ctc(z, y):
    return optax.losses.ctc_loss(z[None], jnp.zeros((1, 11)), y[None], jnp.zeros((1, 2)))


def ctc_forward(z, y):
    return optax.losses.ctc_loss_with_forward_probs(z[None], jnp.zeros((1, 11)), y[None], jnp.zeros((1, 2)))[0]


def of_chances(loss):
    return lambda z, y: loss(jax.nn.log_softmax(z), y)


def triplet(z, positive, negative):
    return optax.losses.triplet_margin_loss(z[None], positive[None], negative[None])


def of_batch(loss):
    return lambda z, y: loss(z[None], y[None])


def dice(loss):
    return lambda z, y: loss(z[None], jax.nn.one_hot(y, 7)[None])


def masked(z, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, y, where=np.arange(7) < 5)


OPTAX = (
    of_optax("squared_error", optax.losses.squared_error, (7,)),
    of_optax("l2_loss", optax.l2_loss, (7,)),
    of_optax("huber_loss", optax.losses.huber_loss, (7,)),
    of_optax("log_cosh", optax.losses.log_cosh, (7,)),
    of_optax("cosine_similarity", optax.losses.cosine_similarity, (7,)),
    of_optax("cosine_distance", optax.losses.cosine_distance, (7,)),
    of_optax("sigmoid_binary_cross_entropy", optax.losses.sigmoid_binary_cross_entropy, chances),
    of_optax("sigmoid_focal_loss", optax.losses.sigmoid_focal_loss, chances),
    of_optax("hinge_loss", optax.losses.hinge_loss, signs),
    of_optax("perceptron_loss", optax.losses.perceptron_loss, signs),
    of_optax("sparsemax_loss", optax.losses.sparsemax_loss, below(2, 7)),
    of_optax("softmax_cross_entropy", optax.losses.softmax_cross_entropy, chances),
    of_optax("safe_softmax_cross_entropy", optax.losses.safe_softmax_cross_entropy, chances),
    of_optax("integer labels", optax.losses.softmax_cross_entropy_with_integer_labels, below(7)),
    of_optax("integer labels, masked", masked, below(5)),
    of_optax("poly_loss_cross_entropy", optax.losses.poly_loss_cross_entropy, chances),
    of_optax("kl_divergence", of_chances(optax.losses.kl_divergence), chances),
    of_optax("kl_divergence_with_log_targets", of_chances(optax.losses.kl_divergence_with_log_targets), log_chances),
    of_optax("generalized_kl_divergence", of_chances(optax.losses.generalized_kl_divergence), chances),
    of_optax("multiclass_hinge_loss", optax.losses.multiclass_hinge_loss, below(7)),
    of_optax("multiclass_perceptron_loss", optax.losses.multiclass_perceptron_loss, below(7)),
    of_optax("multiclass_sparsemax_loss", of_batch(optax.losses.multiclass_sparsemax_loss), below(7)),
    of_optax("fenchel_young", optax.losses.make_fenchel_young_loss(jax.nn.logsumexp), chances),
    of_optax("ranking_softmax_loss", optax.losses.ranking_softmax_loss, chances),
    of_optax("ctc_loss", ctc, labels, x=(11, 3)),
    of_optax("ctc_loss_with_forward_probs", ctc_forward, labels, x=(11, 3)),
    of_optax(
        "ntxent", optax.losses.ntxent, lambda rng, lead: jnp.broadcast_to(jnp.arange(4) // 2, (*lead, 4)), x=(4, 3)
    ),
    of_optax("triplet_margin_loss", triplet, (7,), (7,)),
    of_optax("dice_loss", dice(optax.losses.dice_loss), below(7, 5), x=(5, 3)),
    of_optax("multiclass dice", dice(optax.losses.multiclass_generalized_dice_loss), below(7, 5), x=(5, 3)),
)


# --- fnbp ---


def of_fnbp(id, build, loss, x, y, apply=None, **options):
    """A net on a batch of one, with the state after one batch."""

    def make():
        net, rng = build(), np_rng(id)
        xs, ys = drawn(rng, x, (M,)), drawn(rng, y, (M,))
        params, state = net.init(jax.random.key(0), xs)
        state = net.forward(params, state, xs, fnbp.Context(train=True))[1]
        predict = apply(net) if apply else lambda p, x: fnbp.apply(net, p, state, x)

        def own(p, x, y):
            return loss.forward(predict(p, x[None]), y[None])[0][0]

        return own, filled(params), (xs, ys)

    return Case(f"fnbp: {id}", make, **options)


CROSS = fnbp.softmax_cross_entropy()
FNBP = (
    of_fnbp("mlp", lambda: fnbp.models.mlp(7, 5, 2), CROSS, (3,), below(2), quick=True),
    of_fnbp("mlp, to_jax", lambda: fnbp.models.mlp(7, 2), CROSS, (3,), below(2), apply=fnbp.to_jax),
    of_fnbp("lenet", lambda: fnbp.models.lenet(3), CROSS, (28, 28, 1), below(3)),
    of_fnbp("resnet", lambda: fnbp.models.resnet(8, 3, 2), CROSS, (7, 7, 2), below(3)),
    of_fnbp("lstm_classifier", lambda: fnbp.models.lstm_classifier(7, 2, 2), CROSS, (5, 3), below(2)),
    of_fnbp("gpt", lambda: fnbp.models.gpt(11, 7, 3, 2, 6), CROSS, below(11, 5), below(11, 5), floor=1e-3),
)

CASES = EQUINOX + OPTAX + FNBP
