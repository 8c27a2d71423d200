"""A net that scores the next token, at work: it writes one token after another."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import as_arrays, check_is, check_key, check_size, concrete, describe, of_kind, shown
from fnbp.arrays.placement import by_example, check_whole
from fnbp.arrays.sums import wide
from fnbp.combinators.stepping import beginning, going_on
from fnbp.combinators.unrolling import unrolled
from fnbp.construction import once
from fnbp.layer import Context, Layer

__all__ = ["generate"]


def generate(
    net: Layer,
    params: Any,
    state: Any,
    prompt: Any,
    length: int,
    key: Any = None,
    *,
    temperature: Any = 1.0,
    top_k: int | None = None,
    window: int | None = None,
    cache: bool = True,
) -> jax.Array:
    """Write length tokens behind a prompt, each drawn from the net's scores of the next token.

        s = net(all tokens before) at the last of them      p = softmax(s / temperature)      token ~ p
        token n = jax.random.categorical(jax.random.fold_in(key, n), s / temperature), n from 0, for all examples

    With the cache each layer keeps what later positions need of the earlier ones: attention its keys and values, a scan
    its h. The prompt is read at once, then the net sees one position a turn; for these the layers of repeat are written
    out, so that its weights are held twice. Prompt and turns are one compiled function, made once for equal nets and
    shapes.

    Shapes:  prompt (m, T) of integers, all prompts of one length; scores of the net (m, T, k); returns (m, T + length)
             of int32. The last token is not read, so that the net sees T + length - 1 positions.
    Sources: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2, for the temperature; Fan, Lewis & Dauphin 2018,
             arXiv:1805.04833, for top_k; Shazeer 2019, arXiv:1911.02150, for keys and values that are kept.
    Options: key: a random key; None only for temperature 0. temperature: 0 takes the token of the highest score; it may
             be an array above 0, as in jit. top_k: draw among the k tokens of the highest scores. Of equal scores that
             of the lowest token counts as the highest. window: the most positions that the net sees. When they are used
             up, it reads the later half of them again, from position 0 on; so the text may be longer than learned
             positions. cache: False to apply the net to all positions in each turn, the later ones masked: the
             reference, and the way for a net with layers that take no steps but know a mask.
    Raises:  TypeError if net is not a Layer, the prompt or a size is not of integers, key is not a random key, or a
             layer takes no steps (see fnbp.Steps); ValueError if the prompt is empty or, outside jit, has a token that
             the net does not score, key is missing, temperature is negative or not finite, top_k is not 1 to k, there
             are too many positions, or, outside jit, scores are NaN or infinity. Inside jit the token is -1 where one
             of these is so.
    """
    check_is("generate", "net", net, Layer)
    check_is("generate", "cache", cache, bool)
    check_sizes(length=length, window=window, top_k=top_k)
    temperature = check_draws(key, temperature)
    check_prompt(prompt, window)
    prompt = as_arrays("generate", "prompt", prompt)
    params, state = as_arrays("generate", "params", params), as_arrays("generate", "state", state)
    check_whole("generate", params)
    leaves, tree = jax.tree.flatten(jax.tree.map(jax.typeof, (params, state)))
    k = once(scored, net, tuple(leaves), tree, prompt.shape, positions_of(prompt.shape[1], length, window))
    if top_k is not None and top_k > k:
        raise ValueError(f"generate: top_k must be from 1 to {k}, the scores of the net, got {top_k}")
    check_tokens(prompt, k)
    greedy = temperature is None
    tokens = once(writer, net, length, top_k, window, cache)(
        params, state, prompt.astype(jnp.int32), None if greedy else key, temperature
    )
    check_written(tokens)
    return tokens


def writer(net: Layer, length: int, top_k: int | None, window: int | None, cache: bool) -> Callable[..., jax.Array]:
    """(params, state, prompt, key, temperature) -> tokens, compiled. key None: the highest score."""
    part = cached if cache else uncached

    @jax.jit
    def write(params, state, prompt, key, temperature):
        def draw(scores, n):
            return drawn(scores, key, n, temperature, top_k)

        T = prompt.shape[1]
        at_once = length if window is None else min(length, window - T + 1)
        written = [prompt, part(net, params, state, prompt, at_once, 0, draw)]
        if window is not None and at_once < length:
            turn = max(1, window // 2)  # tokens for each time that the later half is read again
            again = window - turn + 1

            def next_part(seen, i):
                new = part(net, params, state, seen, turn, at_once + i * turn, draw)
                return jnp.concatenate([seen, new], 1)[:, -again:], new

            seen = jnp.concatenate(written, 1)[:, -again:]
            _, parts = jax.lax.scan(next_part, seen, jnp.arange(-(-(length - at_once) // turn)))
            written.append(jnp.moveaxis(parts, 0, 1).reshape(prompt.shape[0], -1)[:, : length - at_once])
        return jnp.concatenate(written, 1)

    return write


Draw = Callable[[jax.Array, Any], jax.Array]


def cached(net: Layer, params: Any, state: Any, seen: jax.Array, length: int, since: Any, draw: Draw) -> jax.Array:
    """The tokens behind those seen, (m, length); each layer keeps what it needs of earlier positions. since: n of the
    first."""
    positions = seen.shape[1] + length - 1
    first, (then, in_turn, _) = beginning(net, positions), unrolled(going_on(net))
    scores, kept, _ = first.forward(params, state, seen, Context())
    token, params = draw(scores[:, -1], since), in_turn(params)

    def turn(carry, n):
        kept, token = carry
        scores, kept, _ = then.forward(params, kept, token[:, None], Context())
        new = draw(scores[:, 0], n)
        return (kept, new), new

    _, tokens = jax.lax.scan(turn, (in_turn(kept), token), since + jnp.arange(1, length))
    return jnp.concatenate([token[:, None], tokens.T], 1)


def uncached(net: Layer, params: Any, state: Any, seen: jax.Array, length: int, since: Any, draw: Draw) -> jax.Array:
    """As cached, by the whole net in each turn; a mask leaves out the positions that are not written yet."""
    m, T = seen.shape
    positions = T + length - 1

    def turn(tokens, n):
        there = jnp.broadcast_to(jnp.arange(positions) < T + n, (m, positions))
        scores = net.forward(params, state, tokens, Context(mask=there))[0]
        last = jax.lax.dynamic_index_in_dim(scores, T + n - 1, 1, keepdims=False)
        new = draw(last, since + n)
        at = jnp.minimum(T + n, positions - 1)  # the last token is not read
        put = jax.lax.dynamic_update_index_in_dim(tokens, new, at, 1)
        return jnp.where(T + n < positions, put, tokens), new

    tokens = jnp.pad(seen, ((0, 0), (0, length - 1)))
    return jax.lax.scan(turn, tokens, jnp.arange(length))[1].T


def drawn(scores: jax.Array, key: Any, n: Any, temperature: Any, top_k: int | None) -> jax.Array:
    """One token for each row of scores (m, k); -1 where one is NaN or infinity, or the temperature is none."""
    scores = wide(scores)
    scores = scores - jnp.max(scores, -1, keepdims=True)  # so that no temperature makes them too large
    lost = jnp.isnan(scores).any(-1)
    if top_k is not None:
        scores = by_example(functools.partial(highest, top_k=top_k), scores)
    if key is None:
        token = jnp.argmax(scores, -1)
    else:
        info, T = jnp.finfo(scores.dtype), jnp.asarray(temperature, scores.dtype)
        lost = lost | ~(T >= 0)
        scaled = jnp.where(jnp.isneginf(scores), scores, scores / jnp.clip(T, info.tiny, info.max))
        token = jax.random.categorical(jax.random.fold_in(key, n), scaled)
    return jnp.where(lost, -1, token).astype(jnp.int32)


def highest(scores: jax.Array, top_k: int) -> jax.Array:
    """The k highest of each row of scores, and -inf in place of the others."""
    _, places = jax.lax.top_k(scores, top_k)
    among = jnp.put_along_axis(jnp.zeros(scores.shape, bool), places, True, -1, inplace=False)
    return jnp.where(among, scores, -jnp.inf)


def positions_of(T: int, length: int, window: int | None) -> int:
    """How many positions the net sees at most."""
    return T + length - 1 if window is None else min(window, T + length - 1)


def scored(net: Layer, leaves: tuple[Any, ...], tree: Any, shape: tuple[int, int], positions: int) -> int:
    """How many tokens a net scores. ValueError if it takes not so many positions, or scores what it does not read."""
    params, state = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves])
    tokens = jax.ShapeDtypeStruct((shape[0], positions), jnp.int32)
    forward = lambda params, state, x: net.forward(params, state, x, Context())[0]  # noqa: E731
    try:
        scores = jax.eval_shape(forward, params, state, tokens)
    except ValueError as error:
        one = jax.ShapeDtypeStruct((shape[0], 1), jnp.int32)
        try:
            jax.eval_shape(forward, params, state, one)
        except ValueError:  # whatever the length
            raise error from None
        came = f"the prompt's {shape[1]} and all but the last of those to write"
        raise ValueError(
            f"generate: the net does not take {positions} positions ({came}): {error}. A shorter window= lets it "
            "write more than it sees at once"
        ) from error
    if not of_kind(scores, jnp.floating) or scores.shape[:2] != tokens.shape or scores.ndim != 3:
        raise ValueError(
            f"generate: the net must return scores (m, T, k) of the next token at each position, got "
            f"{describe(scores)} for tokens of shape {tokens.shape}"
        )
    k = scores.shape[-1]
    with jax.ensure_compile_time_eval():
        last = jnp.full((1, 1), k - 1, jnp.int32)  # a value, which embedding looks at
    try:
        jax.eval_shape(lambda params, state: forward(params, state, last), params, state)
    except ValueError as error:
        raise ValueError(f"generate: the net scores {k} tokens, but does not read all of them: {error}") from error
    return k


def check_sizes(length: Any, window: Any, top_k: Any) -> None:
    """ValueError or TypeError unless these are whole numbers from 1 on; window and top_k may be None."""
    check_size("generate", "length", length)
    for what, value in (("window", window), ("top_k", top_k)):
        if value is not None:
            check_size("generate", what, value)


def check_draws(key: Any, temperature: Any) -> Any:
    """The temperature, or None if it is 0. ValueError or TypeError if it is no temperature, or there is no key."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float, np.number, np.ndarray, jax.Array)):
        raise TypeError(f"generate: temperature must be a number, got {shown(temperature)}")
    if np.shape(temperature) != () or jnp.iscomplexobj(temperature):
        raise TypeError(f"generate: temperature must be one real number, got {describe(temperature)}")
    if concrete(temperature):
        temperature = float(temperature)
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"generate: temperature must be 0 or above, and finite, got {temperature}")
        temperature = min(temperature, float(np.finfo(np.float32).max))  # all tokens are alike long before
    if key is not None:
        check_key("generate", key)
    if concrete(temperature) and temperature == 0:
        return None
    if key is None:
        raise ValueError(
            f"generate: a temperature of {shown(temperature)} draws tokens, so it needs a key, e.g. jax.random.key(0); "
            "temperature=0 takes the highest score"
        )
    return temperature


def check_prompt(prompt: Any, window: int | None) -> None:
    """ValueError or TypeError unless a prompt is of integers (m, T), with at least one, and within the window."""
    if not of_kind(prompt, jnp.integer):
        raise TypeError(f"generate: the prompt must be an array of integers, got {describe(prompt)}")
    if prompt.ndim != 2 or not prompt.size:
        raise ValueError(f"generate: the prompt must be (m, T) with m and T at least 1, got shape {prompt.shape}")
    if window is not None and prompt.shape[1] > window:
        raise ValueError(f"generate: the prompt has {prompt.shape[1]} positions, more than the window of {window}")


def check_tokens(prompt: Any, k: int) -> None:
    """Outside jit, ValueError if a token of the prompt is none of those that the net scores."""
    if concrete(prompt):
        tokens = np.asarray(prompt)
        for first in np.argwhere((tokens < 0) | (tokens >= k))[:1].tolist():
            raise ValueError(
                f"generate: token {tokens[tuple(first)]} of the prompt at index {first} is outside 0..{k - 1}, the "
                "tokens that the net scores"
            )


def check_written(tokens: Any) -> None:
    """Outside jit, ValueError if a token is -1."""
    if concrete(tokens) and tokens.is_fully_addressable:
        for i, t in np.argwhere(np.asarray(tokens) < 0)[:1].tolist():
            raise ValueError(f"generate: the scores for token {t} of example {i} are NaN or infinite")
