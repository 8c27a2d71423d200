"""Every kind of factor: what the backwards of layers and combinators return."""

from fnbp.combinators.factors import Cast, Shared, Stacked
from fnbp.factor import Added, Factor, Mixed, Outer, PerExample, Product, Sum, register_factor
from fnbp.layers.convolution import Correlation
from fnbp.layers.embedding import Lookup, Rows

__all__ = [
    "Added",
    "Cast",
    "Correlation",
    "Factor",
    "Lookup",
    "Mixed",
    "Outer",
    "PerExample",
    "Product",
    "Rows",
    "Shared",
    "Stacked",
    "Sum",
    "register_factor",
]
