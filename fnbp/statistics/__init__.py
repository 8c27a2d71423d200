"""What the gradients of single examples tell: clipping, moments, the noise scale, influence."""

from fnbp.statistics.attribution import influence
from fnbp.statistics.clipping import clipped
from fnbp.statistics.curvature import fisher, ggn_diagonal
from fnbp.statistics.variance import Moments, NoiseScale, moments, noise_scale

__all__ = ["Moments", "NoiseScale", "clipped", "fisher", "ggn_diagonal", "influence", "moments", "noise_scale"]
