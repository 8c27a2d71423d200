"""Wrong backwards by what must be tried, or compared, to see them, and right ones that look suspicious."""

from experiments.attacks import of_conditions as conditions
from experiments.attacks import of_functions as functions
from experiments.attacks import of_layers as layers
from experiments.attacks import of_rounding as rounding
from experiments.attacks.attack import Attack

ATTACKS: tuple[Attack, ...] = (
    *layers.FACTORS,
    *functions.FORWARD_RULES,
    *functions.COTANGENTS,
    *layers.PARAMETERS,
    *functions.COMPLEX,
    *functions.NO_ANSWER,
    *layers.SIZES,
    *functions.BANDS,
    *functions.VALUES,
    *layers.CONTEXTS,
    *layers.STATE,
    *rounding.ROUNDING,
    *layers.TRANSFORMS,
    *conditions.VALUES,
    *conditions.PARAMETERS,
    *conditions.SIZES,
    *conditions.COMBINATORS,
    *conditions.DRAWS,
)
