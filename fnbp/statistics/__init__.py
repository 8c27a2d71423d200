"""What the gradients of single examples tell: clipping, moments, the noise scale, influence; a trace in numbers."""

from fnbp.statistics.attribution import influence
from fnbp.statistics.clipping import clipped
from fnbp.statistics.curvature import fisher, ggn_diagonal
from fnbp.statistics.report import LayerTable, Seen, layer_table
from fnbp.statistics.variance import Moments, NoiseScale, moments, noise_scale

__all__ = [
    "LayerTable",
    "Moments",
    "NoiseScale",
    "Seen",
    "clipped",
    "fisher",
    "ggn_diagonal",
    "influence",
    "layer_table",
    "moments",
    "noise_scale",
]
