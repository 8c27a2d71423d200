"""What compare was asked for, and what is to be compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnbp.arrays.checks import check_is, check_key, describe
from fnbp.comparison.probes import LEVELS, PROBES
from fnbp.comparison.report import Row
from fnbp.comparison.subject import Subject
from fnbp.comparison.transforms import ON_REQUEST, TRANSFORMS
from fnbp.layer import Context

BY_LEVEL = {"quick": (), "full": tuple(TRANSFORMS), "deep": (*TRANSFORMS, "programs")}
LONGEST = 1e6  # seconds; a longer limit is none


class Options(NamedTuple):
    """What to try.

    probes, transforms  by name
    rng                 the generator of all draws
    limit               the seconds that one call may take, or None
    cost                time and memory are measured too
    pairs               probes are tried two by two as well
    quick               only formulas at probes are compared: not repetition, single examples, differences, transforms,
                        nor combinators, if the whole pass is right
    """

    probes: tuple[str, ...]
    transforms: tuple[str, ...]
    rng: np.random.Generator
    limit: float | None
    quick: bool = False
    cost: bool = False
    pairs: bool = False


def options_of(
    level: str,
    probes: Sequence[str] | None,
    transforms: Sequence[str] | None,
    key: jax.Array,
    limit: float | None,
    cost: bool = False,
) -> Options:
    """Check what was asked for; probes and transforms that were not named are those of the level.

    Raises: ValueError for an unknown name, and for a limit that is not above 0; TypeError if key is not a random key.
    """
    if not isinstance(level, str) or level not in LEVELS:
        raise ValueError(f"compare: unknown level {level!r}; there are: {', '.join(LEVELS)}")
    probes = LEVELS[level] if probes is None else probes
    transforms = BY_LEVEL[level] if transforms is None else transforms
    check_names("probe", probes, PROBES)
    if list(probes[:1]) != ["given"]:
        raise ValueError("compare: the first probe must be 'given', the point that all others start from")
    check_names("transform", transforms, {**TRANSFORMS, **ON_REQUEST})
    check_key("compare", key)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
        raise ValueError(f"compare: limit must be above 0 seconds, or None for no limit, got {describe(limit)}")
    limit = None if limit is None or limit > LONGEST else float(limit)
    seed = np.asarray(jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key)
    rng = np.random.default_rng(seed.ravel().tolist())
    return Options(tuple(probes), tuple(transforms), rng, limit, level == "quick", cost, level == "deep")


def check_names(what: str, names: Sequence[str], table: Mapping[str, Any]) -> None:
    """TypeError unless names is a tuple or a list; ValueError for a name that is not in the table."""
    if not isinstance(names, (tuple, list)):
        raise TypeError(f"compare: {what}s must be a tuple of names, got {describe(names)}")
    for name in names:
        if not isinstance(name, str) or name not in table:
            raise ValueError(f"compare: unknown {what} {name!r}; there are: {', '.join(table)}")


def check_for_layer(args: tuple, ctx: Any, of_functions: dict[str, Any]) -> None:
    """TypeError unless a Layer is given one x, a Context, and nothing that goes with a function."""
    check_is("compare", "ctx", ctx, Context)
    if any(value is not None for value in of_functions.values()):
        raise TypeError(
            "compare: reference=, vjp=, sizes=, domain= and name= go with a function; a Layer has its backward in it"
        )
    if len(args) != 1:
        raise TypeError(f"compare: a Layer is compared at one x, got {len(args)} positional arguments")


def check_for_function(of_layers: dict[str, Any], ctx: Any) -> None:
    """TypeError if a function is given what goes with a Layer."""
    for name, value in {**of_layers, "ctx": None if ctx == Context() else ctx}.items():
        if value is not None:
            raise TypeError(f"compare: {name}= goes with a Layer; a function takes all that it needs as arguments")


def check_no_lists(name: str, args: tuple) -> None:
    """TypeError for a list of numbers, which JAX takes for a tree of scalars."""
    for arg in args:
        of_numbers = all(isinstance(leaf, (int, float)) for leaf in jax.tree.leaves(arg))
        if isinstance(arg, (list, tuple)) and arg and of_numbers:
            kind = type(arg).__name__
            raise TypeError(f"compare: {name} is given a {kind} of numbers; give an array: jnp.asarray(...)")


def is_inside(domain: Any, args: tuple) -> bool:
    """What a domain says of arguments. TypeError unless it is a function that returns True or False; what it raises."""
    if not callable(domain):
        raise TypeError(f"compare: domain must be a function, args -> True or False, got {describe(domain)}")
    said: Any = domain(*args)
    if jnp.shape(said) or not jnp.issubdtype(getattr(said, "dtype", type(said)), np.bool_):
        raise TypeError(f"compare: domain must return True or False, got {describe(said)}")
    return bool(said)


class Plan(NamedTuple):
    """What is to be compared.

    subjects   each is compared by itself
    rows_of    the rows of all subjects -> the rows of the report
    notes      what cannot be tried, one line each
    """

    subjects: list[Subject]
    rows_of: Callable[[list[Row]], list[Row]]
    notes: tuple[str, ...] = ()
