"""What the gradients of single examples tell: clipping, moments, the noise scale, influence."""

from fnbp.statistics.clipping import clipped
from fnbp.statistics.influence import influence
from fnbp.statistics.moments import Moments, NoiseScale, moments, noise_scale

__all__ = ["Moments", "NoiseScale", "clipped", "influence", "moments", "noise_scale"]
