"""A mutant as code: its module made anew, and what is built of it."""

import ast
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fnbp
from experiments.mutations import PACKAGE, Mutant

FRESH = "fnbp_mutant"  # what a mutant's module is called


def run(file: str, code: str = "", statement: int = -1, label: str = FRESH) -> types.ModuleType:
    """The source of a file as a fresh module, with one statement of it replaced by code."""
    tree = ast.parse((PACKAGE / file).read_text())
    if code:
        (tree.body[statement],) = ast.parse(code).body
    module = types.ModuleType(FRESH)
    module.__dict__.update({"jax": jax, "jnp": jnp, "np": np})
    sys.modules[FRESH] = module  # dataclasses look their module up
    try:
        exec(compile(tree, label, "exec"), module.__dict__)
    finally:
        del sys.modules[FRESH]
    return module


def build(mutant: Mutant, file: str, name: str) -> Any:
    """The constructor of that name, of that file, with the mistake in it or in what it uses."""
    spoilt_module = run(mutant.file, mutant.code, mutant.statement, mutant.id)
    if file == mutant.file:
        return getattr(spoilt_module, name)
    user, part = run(file, label=mutant.id), getattr(spoilt_module, mutant.owner)
    user.__dict__[mutant.owner] = factor_of(part, mutant.owner) if isinstance(part, type) else part
    return getattr(user, name)


def factor_of(changed: type, name: str) -> type:
    """The library's own factor of that name, with the total of the mutant: what is no Factor is taken for an array."""
    real = getattr(fnbp, name)
    factor = type(name, (real,), {"total": changed.total})  # type: ignore[attr-defined]
    fields = tuple(real.__dataclass_fields__)
    jax.tree_util.register_pytree_node(
        factor, lambda one: ([getattr(one, f) for f in fields], None), lambda _, children: factor(*children)
    )
    return factor
