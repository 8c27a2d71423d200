"""Factors of any JAX function: where its parameters meet data, and what its backward knows there."""

from fnbp.opening.opener import Opened, opened
from fnbp.opening.views import ParameterUse, Uses

__all__ = ["Opened", "ParameterUse", "Uses", "opened"]
