"""flatstep: a compiled optimizer engine for MLX, with the interface of ``mlx.optimizers``.

``import flatstep as optim`` where a training loop says ``import mlx.optimizers as optim``.
"""

from ._environment import num_threads as _num_threads
from ._mlx_version import check_mlx_version

check_mlx_version()

from . import _ext, optimizers, schedulers  # noqa: E402
from .layout import Segment  # noqa: E402
from .optimizers import *  # noqa: E402, F403
from .schedulers import *  # noqa: E402, F403

_ext.set_num_threads(_num_threads())

__version__ = "0.1.0"

__all__ = ["Segment", "optimizers", "schedulers"]
__all__ += optimizers.__all__
__all__ += schedulers.__all__
