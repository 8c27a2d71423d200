"""Mutants that are no mistakes: each survives because it computes the same, for the reason given."""

import re
from functools import cache

KINK = "another slope at a kink, between those of its two sides: a convention"
MASK = "it is a mask: true and false pass through any dtype, any sign and any clip"
UNTAKEN = "it changes values in the branch that where does not take, and no one differentiates a backward"
EVEN = "(1 + y) (1 - y) is even in y"
ONE_ENTRY = "the tuple has one entry: its first is its last"
CENTRED = "the rows of this dx sum to 0: their mean is rounding"
CHECKED = "it only checks lengths, which are alike"
ALIKE = "dy has the dtype of y"
ROUNDED = "its own rounding is no larger than that of the result, in a dtype of 8 or 11 bits"
SHAPED = "only the shape behind the first axis is read of what is saved here"
WHOLE = "tokens are whole numbers of at least 0: in an array of integers no such change is to be seen"
SLIDING = "where windows are slid, the size of the array below them is not read"
TYPED = "only the dtype is read of what is saved here"
DROPPED = "JAX drops what is added out of range, asked to or not"
VECTOR = "a vector is its own transpose"
BOUNDED = "x^ is at most the root of the number of features"
GROUPS = "it is the number of groups, a whole number of at least 1"
UNCOUNTED = "where a position does not count, dy is 0 and dx is made 0"
COUNTED = "an integer has no cotangent: what stands in its place is read by nobody"
REFUSED = (
    "a token outside of the table is refused; inside jit, where it is not, a row of the gradient is NaN either way"
)
ONE_LEFT = "backwards take means over the last axis, among others, of which one number is left"
OF_PARAMS = "backward casts params only, which are floating point numbers"
FORMS = "the two forms have the same values"
UNSEEN = "softmax does not see a bias of the keys, so there is none"
RECORDED = "it changes only what trace and the whole pass of compare record; the gradients stay as they are"
WIDE = "what is saved of x is widened again: the same values, and more memory"
UNMASKED = "where there is no mask, where returns the first, too"
LIKE_Y = "da has the shape of y_hat"
ONE = "it is 1, in any dtype"
TIMES_0 = "it is multiplied by 0"
OFFSET = "it is a small whole number, which any dtype holds exactly"

ELU = "layers/activation.py:elu.backward:"
RELU = "layers/activation.py:relu.forward saves:*: x > 0"
LOG_SOFTMAX = "layers/activation.py:log_softmax.backward:"
LOOKUP = "layers/embedding.py:Lookup.total:"
EQUIVALENT: tuple[tuple[str, str], ...] = (  # pattern of an id, * for anything, and the reason
    (f"{RELU} -> x >= 0 in *", KINK),
    (f"{RELU}: saved in *float*", MASK),
    (f"{RELU}: saved with the sign changed", MASK),
    (f"{RELU}: jax.nn.relu(x) saved in its place", "it is true where x > 0"),
    ("layers/activation.py:leaky_relu.forward saves:*: positive: saved in *float*", MASK),
    ("layers/activation.py:leaky_relu.forward saves:*: positive: saved with the sign changed", MASK),
    ("layers/activation.py:tanh.forward saves:*: y: saved with the sign changed", EVEN),
    (f"{ELU}comparison: x > 0 -> x >= 0 in jnp.where(x > 0, dy, *", KINK),
    (f"{ELU}comparison: x > 0 -> x >= 0 in jnp.where(x > 0, 0, x)", "both branches hold 0 at 0"),
    (f"{ELU}branch: jnp.where(x > 0, 0, x) -> x", UNTAKEN),
    (f"{ELU}constant: 0 -> 1 in jnp.where(x > 0, 0, x)*", UNTAKEN),
    (f"{ELU}constant: 0 -> -1 in jnp.where(x > 0, 0, x) #2", UNTAKEN),
    (f"{ELU}constant: 0 -> 0.0001 in jnp.where(x > 0, 0, x)", UNTAKEN),
    ("layers/activation.py:*softmax.backward:moved: result: centred along the last axis", CENTRED),
    ("layers/activation.py:*softmax.backward:stray term: result: a stray mean", CENTRED),
    ("layers/pooling.py:*.forward saves:*: like(x): saved *", SHAPED),
    ("losses/*:*.forward saves:*: like(a): saved *", TYPED),
    ("layers/pooling.py:max_pool.forward saves:*: first: saved in *float*", OFFSET),
    ("layers/pooling.py:max_pool.forward saves:*: first: saved as rounded", OFFSET),
    ("layers/pooling.py:max_pool.forward saves:*: first: saved with a stray 1e-4", OFFSET),
    ("layers/pooling.py:global_avg_pool.backward:name: dy -> spread in *", "both have as many examples"),
    ("combinators/parallel.py:JOINS.backward:moved: result: reversed", "every layer of a sum is given the same dy"),
    (
        "combinators/parallel.py:JOINS.backward:zeroed: result: right for two examples or more #2",
        "a tuple that another layer takes has at least two entries",
    ),
    ("combinators/tie.py:look_up:name: at -> tree in isinstance(at, Around)", RECORDED),
    ("combinators/tie.py:put:name: value -> * in put(tree.inside, keys, value)", RECORDED),
    ("combinators/parts.py:one_part.backward_packed:constant: 0 -> -1 in backward(params[0], res, dy)", ONE_ENTRY),
    ("combinators/parts.py:one_part.backward_packed:factors: factors: in another order", ONE_ENTRY),
    ("combinators/parts.py:one_part.backward_packed:factors: factors: those of the first, throughout", ONE_ENTRY),
    ("combinators/*:*.backward:*: True -> False in zip(*, strict=True)", CHECKED),
    ("combinators/*:*.backward:*: zip(*, strict=True) -> zip(*)", CHECKED),
    ("combinators/wrappers.py:to:branch: * -> a.astype(dtype)", OF_PARAMS),
    ("combinators/wrappers.py:cast.forward saves:residual: x -> due in like(x)", "y has the dtype of x"),
    ("combinators/wrappers.py:cast.forward saves:*: like(*): saved in *", TYPED),
    ("combinators/wrappers.py:cast.forward saves:*: like(*): saved as *", TYPED),
    ("combinators/wrappers.py:cast.forward saves:*: like(*): saved of *", TYPED),
    ("combinators/wrappers.py:cast.forward saves:*: like(*): saved with the sign changed", TYPED),
    ("combinators/wrappers.py:cast.forward saves:*: like(*): saved with a stray 1e-4", TYPED),
    ("factor.py:*Sum.total:moved: result: reshaped through its transpose", VECTOR),
    ("layers/convolution.py:conv_transpose.backward:name: x -> dy in over(x)", SLIDING),
    ("layers/embedding.py:embedding.forward saves:*: x: saved with a stray 1e-4", WHOLE),
    ("layers/embedding.py:embedding.backward:*: Lookup[1] of 'E': absolute", WHOLE),
    ("layers/embedding.py:embedding.backward:*: Lookup[1] of 'E': small ones flushed", WHOLE),
    ("layers/embedding.py:embedding.forward saves:*: x: saved as rounded", WHOLE),
    ("layers/embedding.py:embedding.backward:*: Lookup[1] of 'E': with a cancellation", WHOLE),
    (f"{LOOKUP}axis: table.at[self.x].add(* -> table.at[self.x].add(wide(self.d), mode='drop')", WHOLE),
    (
        f"{LOOKUP}axis: * -> table.at[self.x].add(wide(self.d), wrap_negative_indices=False)",
        DROPPED,
    ),
    (f"{LOOKUP}axis: False -> True in table.at[self.x].add(*", WHOLE),
    ("layers/convolution.py:*.backward:*: Correlation[3] of 'W': with a cancellation", GROUPS),
    ("layers/convolution.py:*.backward:*: Correlation[3] of 'W': absolute", GROUPS),
    ("layers/convolution.py:*.backward:*: Correlation[3] of 'W': small ones flushed", GROUPS),
    ("layers/dropout.py:dropping.forward saves:*: keep: saved in *float*", MASK),
    ("layers/dropout.py:dropping.forward saves:*: keep: saved with the sign changed", MASK),
    ("layers/norm.py:*.backward:transpose: params['gamma'] -> params['gamma'].T in *", VECTOR),
    ("layers/norm.py:layer_norm.backward:moved: dx: centred along the last axis", CENTRED),
    ("layers/norm.py:rms_norm.backward:stray term: Product[1] of 'gamma': clipped at 1000", BOUNDED),
    ("layers/norm.py:group_norm.backward:name: x -> dy in reshaped(x_hat, *x.shape)", "dy has the shape of x"),
    ("combinators/loops.py:scan.forward saves:*: like(h_T): saved in another order", SHAPED),
    (
        "combinators/loops.py:scan.backward:name: counts -> mask in dh_in if counts is None else *",
        "both are None, or neither",
    ),
    ("layers/pooling.py:along:stray term: result: clipped at 1*", MASK),
    ("layers/pooling.py:along:stray term: result: a stray square", MASK),
    ("layers/pooling.py:along:stray term: result: small ones flushed", MASK),
    ("layers/pooling.py:along:scaled: result: divided by its last axis", MASK),
    ("layers/pooling.py:along:precision: result: through *float*", MASK),
    ("layers/pooling.py:along:scaled: result: off by 1e-*", MASK),
    ("arrays/sums.py:mean:scaled: result: divided by its last axis*", ONE_LEFT),
    ("arrays/sums.py:mean:moved: result: rolled along the last axis*", ONE_LEFT),
    ("layers/attention.py:attention.backward:name: dk -> * in Sum(dk)", UNSEEN),
    ("layers/embedding.py:embedding.backward:constant: 0 -> -1 in jnp.where(inside, x, 0)", REFUSED),
    ("layers/embedding.py:embedding.backward:name: dx: x in its place", COUNTED),
    ("layers/norm.py:group_norm.backward:name: x -> dy in reshaped(dx, *x.shape)", "dy has the shape of x"),
    ("losses/entropy.py:weighed:name: w -> k in w is None and (not e)", FORMS),
    ("losses/entropy.py:weighed:name: result: w in its place #2", "there it is None"),
    ("losses/entropy.py:minus_one_hot:axis: row.at[i].set(*mode='drop') -> row.at[i].set(*", DROPPED),
    ("arrays/sums.py:complement:stray term: result: clipped at 1000", "it is at most 1"),
    ("arrays/sums.py:left:branch: * -> less", UNCOUNTED),
    ("arrays/sums.py:left:name: counts -> mu in jnp.where(counts, less, 0)", UNCOUNTED),
    ("arrays/sums.py:left:name: counts -> less in jnp.where(counts, less, 0)", "where it is 0, so is what is left"),
    ("arrays/sums.py:left:constant: 0 -> * in jnp.where(counts, less, 0)", UNCOUNTED),
    ("factor.py:Mixed.total:transpose: self.d -> self.d.T", VECTOR),
    ("layers/embedding.py:embedding.backward:constant: 0 -> 1 in jnp.where(inside, x, 0)", REFUSED),
    ("layers/embedding.py:embedding.backward:name: dx: inside in its place", COUNTED),
    ("layers/norm.py:layer_norm.backward:stray term: Product[1] of 'gamma': clipped at 1000", BOUNDED),
    ("layers/pooling.py:along:zeroed: result: negative half zeroed", MASK),
    ("layers/pooling.py:along:precision: result: in float32", MASK),
    ("layers/widening.py:in_wide.forward_wide saves:*: widened -> given in *", WIDE),
    ("losses/entropy.py:softmax_cross_entropy.backward:name: y_hat -> da in is_good(y_hat, y)", LIKE_Y),
    ("losses/entropy.py:weighed:name: w -> y in w is None and (not e)", FORMS),
    ("losses/entropy.py:of_probabilities.dloss:name: no -> p in *, 0 * (yes + no)) #2", TIMES_0),
    ("losses/weights.py:counting_some.forward saves:*: c: saved in *float*", MASK),
    ("combinators/loops.py:scan.backward:name: counts -> like_h in dh_in if counts is None else *", UNMASKED),
    ("combinators/wrappers.py:cast.forward saves:*: like(x): to_dtypes_of(due, y) saved in its place", TYPED),
    ("combinators/wrappers.py:ragged.forward saves:*: mask: saved with the sign changed", MASK),
    ("combinators/wrappers.py:ragged.forward saves:*: after -> x in (res, mask, after, wrong)", UNCOUNTED),
    ("layers/pooling.py:last.forward saves:*: here: saved with the sign changed", MASK),
    ("layers/pooling.py:last.forward saves:*: here: saved in *float*", MASK),
)


@cache
def pattern(text: str) -> re.Pattern:
    """A pattern in which only * is special."""
    return re.compile(".*".join(re.escape(part) for part in text.split("*")))


def reason_of(name: str) -> str:
    """The reason why the mutant of that id is equivalent, or "" if none is known."""
    return next((reason for text, reason in EQUIVALENT if pattern(text).fullmatch(name)), "")
