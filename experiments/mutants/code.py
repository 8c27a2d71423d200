"""A mutant as code: its module made anew, and what is built of it."""

import ast
import inspect
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mutants.catalogue import Mutant
from experiments.mutants.sites import callers, live, read, within_backwards

FRESH = "fnbp_mutant"  # what a mutant's module is called
LIFT = "layer.py"  # what every layer is made with; its classes are the library's own in a fresh module too


def run(file: str, code: str = "", statement: int = -1, label: str = FRESH, alias: str = "") -> types.ModuleType:
    """The source of a file as a fresh module, with one statement of it replaced by code.

    alias: a function that its backwards, and they alone, are to find under the name spoilt_name(alias).
    """
    source = read(file)
    if code:
        (source.tree.body[statement],) = ast.parse(code).body
    for name in within_backwards(source) if alias else ():
        name.id = spoilt_name(alias) if name.id == alias else name.id
    module = types.ModuleType(FRESH)
    module.__dict__.update({"jax": jax, "jnp": jnp, "np": np})
    sys.modules[FRESH] = module  # dataclasses look their module up
    try:
        exec(compile(ast.fix_missing_locations(source.tree), label, "exec"), module.__dict__)
    finally:
        del sys.modules[FRESH]
    for name, real in vars(source.live).items() if file == LIFT else ():
        module.__dict__[name] = real if isinstance(real, type) else module.__dict__[name]
    return module


def spoilt_name(name: str) -> str:
    """What backwards call a helper that is right elsewhere."""
    return f"{name}_of_backwards"


def build(mutant: Mutant, file: str, name: str) -> Any:
    """The constructor of that name, of that file, with the mistake in it or in what it uses."""
    spoilt_module = run(mutant.file, mutant.code, mutant.statement, mutant.id)
    part = getattr(spoilt_module, mutant.owner)
    part = factor_of(part, mutant.file, mutant.owner) if isinstance(part, type) else part
    if mutant.shared:
        user = run(file, label=mutant.id, alias=mutant.owner)
        user.__dict__[spoilt_name(mutant.owner)] = part
        if LIFT in callers()[mutant.file, mutant.owner] and file != LIFT:
            lift = run(LIFT, label=mutant.id, alias=mutant.owner)
            lift.__dict__[spoilt_name(mutant.owner)] = part
            wire(lift, LIFT, user)
    elif file == mutant.file:
        return part if name == mutant.owner else getattr(spoilt_module, name)
    else:
        user = run(file, label=mutant.id)
        spoilt_module.__dict__[mutant.owner] = part
        wire(spoilt_module, mutant.file, user, (mutant.owner,) if isinstance(part, type) else ())
    return getattr(user, name)


def wire(fresh: types.ModuleType, file: str, user: types.ModuleType, only: tuple[str, ...] = ()) -> None:
    """user with the functions of a fresh module, or only these names, in place of those it imported from that file."""
    real = vars(live(file))
    for name in only or [name for name, f in real.items() if inspect.isfunction(f)]:
        if user.__dict__.get(name) is real[name]:
            user.__dict__[name] = fresh.__dict__[name]


def factor_of(changed: type, file: str, name: str) -> type:
    """The library's own factor of that name, with the total of the mutant: what is no Factor is taken for an array."""
    real = getattr(live(file), name)
    factor = type(name, (real,), {"total": changed.total})  # type: ignore[attr-defined]
    fields = tuple(real.__dataclass_fields__)
    jax.tree_util.register_pytree_node(
        factor, lambda one: ([getattr(one, f) for f in fields], None), lambda _, children: factor(*children)
    )
    return factor
