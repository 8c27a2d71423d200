"""Every kind of factor: what the backwards of layers and combinators return."""

from fnbp.combinators.factors import Cast, Shared, Stacked
from fnbp.factor import Added, Factor, Mixed, Outer, PerExample, Product, Sum, register_factor
from fnbp.layers.convolution import Correlation
from fnbp.layers.embedding import Lookup, Rows
from fnbp.opening.factors import ByVjp, LaidOut, Nothing, Through

__all__ = [
    "Added",
    "ByVjp",
    "Cast",
    "Correlation",
    "Factor",
    "LaidOut",
    "Lookup",
    "Mixed",
    "Nothing",
    "Outer",
    "PerExample",
    "Product",
    "Rows",
    "Shared",
    "Stacked",
    "Sum",
    "Through",
    "register_factor",
]
