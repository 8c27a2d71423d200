"""What the gradients of single examples tell: clipping, moments, the noise scale, influence, curvature."""

from fnbp.statistics.attribution import influence
from fnbp.statistics.clipping import clipped
from fnbp.statistics.curvature import fisher, ggn_diagonal
from fnbp.statistics.preconditioning import ekfac, foof, kfac
from fnbp.statistics.variance import Moments, NoiseScale, moments, noise_scale

__all__ = [
    "Moments",
    "NoiseScale",
    "clipped",
    "ekfac",
    "fisher",
    "foof",
    "ggn_diagonal",
    "influence",
    "kfac",
    "moments",
    "noise_scale",
]
