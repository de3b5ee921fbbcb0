"""flatstep: a compiled optimizer engine for MLX, with the interface of ``mlx.optimizers``.

``import flatstep as optim`` where a training loop says ``import mlx.optimizers as optim``.
"""

from ._environment import num_threads as _num_threads
from ._mlx_version import check_mlx_version

check_mlx_version()

# What flatstep has no rule for yet comes from MLX as it is, so that changing the import is enough.
from mlx.optimizers import (  # noqa: E402
    AdaDelta,
    Adafactor,
    Adagrad,
    Adamax,
    Lion,
    MultiOptimizer,
    Muon,
    Optimizer,
    RMSprop,
    clip_grad_norm,
)

from . import _ext, optimizers, schedulers  # noqa: E402
from .layout import Segment  # noqa: E402
from .optimizers import SGD, Adam, AdamW, FlatUpdate  # noqa: E402
from .schedulers import (  # noqa: E402
    cosine_decay,
    exponential_decay,
    join_schedules,
    linear_schedule,
    step_decay,
)

_ext.set_num_threads(_num_threads())

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FlatUpdate",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "Optimizer",
    "RMSprop",
    "Segment",
    "clip_grad_norm",
    "cosine_decay",
    "exponential_decay",
    "join_schedules",
    "linear_schedule",
    "optimizers",
    "schedulers",
    "step_decay",
]
