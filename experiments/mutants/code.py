"""A mutant as code: a fresh module, and the constructor that is built from it."""

import ast
import sys
import types
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.mutants.catalogue import Mutant
from experiments.mutants.sites import callers, chain, live, owner_of, read, within_backwards

FRESH = "fnbp_mutant"  # what a mutant's module is called
LIFT = "layer.py"  # what every layer is made with; its classes are the library's own in a fresh module too
FACTORS = "factor.py"  # the base of every factor: what is no Factor is taken for an array


def run(
    file: str, code: str = "", statement: int = -1, label: str = FRESH, aliases: Collection[str] = ()
) -> types.ModuleType:
    """The source of a file as a fresh module, with one statement of it replaced by code.

    aliases: functions that its backwards, and nothing else, find under the name spoilt_name(alias).
    """
    source = read(file)
    if code:
        (source.tree.body[statement],) = ast.parse(code).body
    for name in within_backwards(source) if aliases else ():
        name.id = spoilt_name(name.id) if name.id in aliases else name.id
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
        return getattr(for_backwards(spoilt_module, mutant, file), name)
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


def for_backwards(spoilt_module: types.ModuleType, mutant: Mutant, file: str) -> types.ModuleType:
    """A file in which the backwards alone reach the mistake, by whatever helpers stand between them and it."""
    fresh, spoilt = {mutant.file: spoilt_module}, {}
    for where, helper in chain(mutant.file, mutant.owner):
        if where not in fresh:
            fresh[where] = run(where, label=mutant.id)
            for other, module in list(fresh.items())[:-1]:
                wire(module, other, fresh[where])
        spoilt[helper] = getattr(fresh[where], helper)
    told = {spoilt_name(helper): f for helper, f in spoilt.items()}
    user = run(file, label=mutant.id, aliases=spoilt)
    user.__dict__.update(told)
    for caller in {caller for one in chain(mutant.file, mutant.owner) for caller in callers()[one]} - {file}:
        if wired(caller, user):
            between = run(caller, label=mutant.id, aliases=spoilt)
            between.__dict__.update(told)
            wire(between, caller, user)
    return user


def wired(file: str, user: types.ModuleType) -> list[str]:
    """What a module imported from a file of the functions, classes and tables that are made there."""
    own = [top.name if isinstance(top, ast.ClassDef) else owner_of(top) for top in read(file).tree.body]
    return [name for name in own if name and user.__dict__.get(name) is getattr(live(file), name)]


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
