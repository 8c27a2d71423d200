"""What single gradients tell: clipping, moments, noise scale, influence, curvature; a trace in numbers."""

from fnbp.statistics.attribution import influence
from fnbp.statistics.clipping import clipped
from fnbp.statistics.curvature import fisher, ggn_diagonal
from fnbp.statistics.preconditioning import ekfac, foof, kfac
from fnbp.statistics.report import LayerTable, Seen, layer_table
from fnbp.statistics.variance import Moments, NoiseScale, moments, noise_scale

__all__ = [
    "LayerTable",
    "Moments",
    "NoiseScale",
    "Seen",
    "clipped",
    "ekfac",
    "fisher",
    "foof",
    "ggn_diagonal",
    "influence",
    "kfac",
    "layer_table",
    "moments",
    "noise_scale",
]
