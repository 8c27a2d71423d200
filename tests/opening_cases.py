"""The one registry of losses that fnbp.opened must open, or refuse; here the forms of params and batches."""

import jax
import jax.numpy as jnp

from tests import (
    opening_cases_flax,
    opening_cases_jax,
    opening_cases_loops,
    opening_cases_others,
    opening_cases_rules,
    opening_cases_uses,
)
from tests.opening_case import DENSE, below, case, dense, energy, keys, narrow

# --- forms of params and of batches ---


def dropped(p, x, key):
    return energy(jnp.where(jax.random.bernoulli(key, 0.7, (7,)), dense(p, x), 0))


def reparametrised(p, x, key):
    return energy(x @ p["w"] + jnp.exp(p["b"]) * jax.random.normal(key, (7,)))


HALF = narrow(jnp.bfloat16, 3, 7)
FORMS = (
    case("form: params, an array", lambda w, x: energy(x @ w), (3, 7), (3,)),
    case(
        "form: params, a list with None", lambda p, x: energy(x @ p[0]["w"] + p[2]), [{"w": (3, 7)}, None, (7,)], (3,)
    ),
    case("form: params, a scalar", lambda c, x: energy(c * x), (), (3,)),
    case(
        "form: batch, a tree", lambda p, b: energy(b["x"] @ p["w"] + b["y"][0]), {"w": (3, 7)}, {"x": (3,), "y": [()]}
    ),
    case("form: batch, scalars", lambda p, x, y: (p["w"] * x + p["b"] - y) ** 2, {"w": (), "b": ()}, (), ()),
    case("form: batch, integers alone", lambda p, i: energy(p["w"] * i), {"w": (3,)}, below(7, 3)),
    case(
        "form: shared", lambda p, x, t, y: energy(dense(p, x) * t - y), DENSE, (3,), (7,), (7,), shared=(2,), quick=True
    ),
    case("form: shared, a table", lambda p, t, i: energy(dense(p, t[i])), DENSE, (7, 3), below(7), shared=(1,)),
    case("form: keys, dropout", dropped, DENSE, (3,), keys, quick=True),
    case("form: keys, noise", reparametrised, DENSE, (3,), keys),
    case("form: bfloat16", lambda p, x: energy(x @ p["w"]), {"w": HALF}, narrow(jnp.bfloat16, 3), tolerance=2e-2),
    case("form: bfloat16 weights", lambda p, x: energy(x @ p["w"].astype(float)), {"w": HALF}, (3,), tolerance=2e-2),
    case(
        "form: float32",
        lambda p, x: energy(dense(p, x)),
        {k: narrow(jnp.float32, *s) for k, s in DENSE.items()},
        narrow(jnp.float32, 3),
        tolerance=1e-5,
    ),
    case("form: aux", lambda p, x: (energy(y := dense(p, x)), {"y": y, "n": 3}), DENSE, (3,), has_aux=True),
)


PARTS = (
    opening_cases_uses,
    opening_cases_loops,
    opening_cases_rules,
    opening_cases_jax,
    opening_cases_flax,
    opening_cases_others,
)
CASES = sum((part.CASES for part in PARTS), FORMS)
