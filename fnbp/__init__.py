"""fnbp: backpropagation as a value. Every layer is (init, forward, backward); the backward is the published formula.

The public names are those in the `__all__` of the modules below.
"""

from importlib.metadata import version

from fnbp.backpropagation import *
from fnbp.combinators.loops import *
from fnbp.combinators.parallel import *
from fnbp.combinators.serial import *
from fnbp.combinators.tie import *
from fnbp.combinators.wrappers import *
from fnbp.comparison import *
from fnbp.construction import *
from fnbp.contraction import *
from fnbp.contractions import *
from fnbp.exchange import *
from fnbp.factor import *
from fnbp.interop import *
from fnbp.layer import *
from fnbp.layers.activation import *
from fnbp.layers.attention import *
from fnbp.layers.convolution import *
from fnbp.layers.dense import *
from fnbp.layers.dropout import *
from fnbp.layers.embedding import *
from fnbp.layers.initializers import *
from fnbp.layers.norm import *
from fnbp.layers.pooling import *
from fnbp.layers.recurrent import *
from fnbp.losses.entropy import *
from fnbp.losses.linear import *
from fnbp.losses.loss import *
from fnbp.losses.metrics import *
from fnbp.losses.squared import *
from fnbp.measurement import *
from fnbp.models.blocks import *
from fnbp.naming import *
from fnbp.opening import *
from fnbp.pairs import *
from fnbp.rendering.tables import *
from fnbp.steps import *
from fnbp.training.checkpoints import *
from fnbp.training.data import *
from fnbp.training.evaluation import *
from fnbp.training.fit import *
from fnbp.training.records import *
from fnbp.training.steps import *

from . import factors, models, sharding, statistics, testing

__version__ = version("fnbp")
