"""A mutant as code: a fresh module, and the constructor that is built from it."""

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
FACTORS = "factor.py"  # the base of every factor: what is no Factor is taken for an array


def run(file: str, code: str = "", statement: int = -1, label: str = FRESH, alias: str = "") -> types.ModuleType:
    """The source of a file as a fresh module, with one statement of it replaced by code.

    alias: a function that only its backwards find under the name spoilt_name(alias).
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
    if file == LIFT:
        module.__dict__.update({name: real for name, real in vars(source.live).items() if isinstance(real, type)})
    return module


def spoilt_name(name: str) -> str:
    """The name by which backwards call a helper that is right elsewhere."""
    return f"{name}_of_backwards"


def build(mutant: Mutant, file: str, name: str) -> Any:
    """The constructor of that name, of that file, with the mistake in it or in what it uses."""
    spoilt_module = run(mutant.file, mutant.code, mutant.statement, mutant.id)
    if mutant.shared:
        part = getattr(spoilt_module, mutant.owner)
        user = run(file, label=mutant.id, alias=mutant.owner)
        user.__dict__[spoilt_name(mutant.owner)] = part
        for caller in callers()[mutant.file, mutant.owner] - {file}:
            if wired(caller, user):
                between = run(caller, label=mutant.id, alias=mutant.owner)
                between.__dict__[spoilt_name(mutant.owner)] = part
                wire(between, caller, user)
        return getattr(user, name)
    is_base = mutant.file == FACTORS and isinstance(getattr(spoilt_module, mutant.owner), type)
    if is_base:
        spoilt_module.__dict__[mutant.owner] = factor_of(
            getattr(spoilt_module, mutant.owner), mutant.file, mutant.owner
        )
    if file == mutant.file:
        return getattr(spoilt_module, name)
    user = run(file, label=mutant.id)
    wire(spoilt_module, mutant.file, user, (mutant.owner,) if is_base else ())
    return getattr(user, name)


def wired(file: str, user: types.ModuleType) -> list[str]:
    """The functions and classes of a file that a module imported from it."""
    own = [(name, f) for name, f in vars(live(file)).items() if inspect.isfunction(f) or inspect.isclass(f)]
    return [name for name, f in own if f.__module__ == live(file).__name__ and user.__dict__.get(name) is f]


def wire(fresh: types.ModuleType, file: str, user: types.ModuleType, only: tuple[str, ...] = ()) -> None:
    """Replace what user imported from that file, or only these names, by what a fresh module holds."""
    for name in only or wired(file, user):
        if user.__dict__.get(name) is getattr(live(file), name):
            user.__dict__[name] = fresh.__dict__[name]


def factor_of(changed: type, file: str, name: str) -> type:
    """The library's own factor of that name, with the total of the mutant: it must stay a Factor."""
    real = getattr(live(file), name)
    factor = type(name, (real,), {"total": changed.total})  # type: ignore[attr-defined]
    fields = tuple(real.__dataclass_fields__)
    jax.tree_util.register_pytree_node(
        factor, lambda one: ([getattr(one, f) for f in fields], None), lambda _, children: factor(*children)
    )
    return factor
