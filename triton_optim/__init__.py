"""torch.optim optimizers whose whole step is one fused Triton launch."""

from pathlib import Path

if not (Path(__file__).parent / "kernels" / "rules.py").is_file():
    # A checkout that lost its symlinks; a wheel always has the folder.
    _root = Path(__file__).parent.parent
    if (_root / "kernels" / "rules.py").is_file():
        __path__.append(str(_root))

from . import testing
from .launch.backend import flag
from .optimizer import FusedOptimizer
from .optimizers.adadelta import Adadelta
from .optimizers.adagrad import Adagrad
from .optimizers.adam import Adam
from .optimizers.adamax import Adamax
from .optimizers.adamw import AdamW
from .optimizers.asgd import ASGD
from .optimizers.lion import Lion
from .optimizers.nadam import NAdam
from .optimizers.radam import RAdam
from .optimizers.rmsprop import RMSprop
from .optimizers.rowwise_adagrad import RowwiseAdagrad
from .optimizers.rprop import Rprop
from .optimizers.sgd import SGD
from .rule import RowWise, Rule, StateTensor
from .scalar_state import ScalarState
from .training.clip_grad import clip_grad_norm_
from .training.cuda_graphs import GraphedStep
from .training.in_backward import step_in_backward
from .training.master_weights import fp32_state_dict, load_fp32_state_dict

__version__ = "0.1.0"
__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "GraphedStep",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "RowWise",
    "RowwiseAdagrad",
    "Rprop",
    "Rule",
    "ScalarState",
    "StateTensor",
    "clip_grad_norm_",
    "flag",
    "fp32_state_dict",
    "load_fp32_state_dict",
    "step_in_backward",
    "testing",
]
OPTIMIZERS = (
    "SGD",
    "ASGD",
    "Adagrad",
    "RMSprop",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adadelta",
    "Rprop",
)
