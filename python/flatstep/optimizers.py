"""The optimizers with the interface of ``mlx.optimizers``, on the fused engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.optimizers as mlx_optimizers

# What flatstep has no rule for yet comes from MLX as it is, so that changing the import is enough.
from mlx.optimizers import (
    AdaDelta,
    Adafactor,
    Adagrad,
    Adamax,
    MultiOptimizer,
    Muon,
    Optimizer,
    RMSprop,
)

from .additions import FlatUpdate
from .checks import as_betas, as_finite
from .clipping import clip_grad_norm
from .fused import FusedOptimizer, LearningRate
from .groups import Group, ParameterGroup, no_decay
from .loss_scale import DynamicLossScale
from .step_options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD", "Adam", "AdamW", "FlatUpdate", "FusedOptimizer", "Lion"]
__all__ += ["Adam8bit", "AdamW8bit", "Lion8bit", "SGD8bit"]
__all__ += ["AdaDelta", "Adafactor", "Adagrad", "Adamax", "Muon", "RMSprop"]
__all__ += ["MultiOptimizer", "Optimizer", "clip_grad_norm"]
__all__ += ["DynamicLossScale", "Group", "ParameterGroup", "no_decay"]


class SGD(FusedOptimizer, mlx_optimizers.SGD):
    r"""The stochastic gradient descent optimizer.

    Updates a parameter :math:`w` with a gradient :math:`g` as follows

    .. math::

        v_{t+1} &= \mu v_t + (1 - \tau) g_t \\
        w_{t+1} &= w_t - \lambda v_{t+1}

    with :math:`g_t + \text{weight\_decay} \cdot w_t` in place of :math:`g_t` if there is a weight
    decay, and :math:`g_t + \mu v_{t+1}` in place of :math:`v_{t+1}` in the second line with
    Nesterov momentum. Without momentum :math:`v_{t+1} = g_t`.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        momentum (float, optional): The momentum strength :math:`\mu`. Default: ``0``
        weight_decay (float, optional): The weight decay (L2 penalty). Default: ``0``
        dampening (float, optional): Dampening for momentum :math:`\tau`. Default: ``0``
        nesterov (bool, optional): Enables Nesterov momentum. Default: ``False``
        **options: How state and parameters are stored, what becomes of gradients, averages of the
          weights, and groups of parameters: see :class:`FusedOptimizer`.

    Raises:
        ValueError: an argument is not finite in float32, or out of its range.

    Source: ``mlx.optimizers.SGD``.

    Example:
        >>> import flatstep as optim, mlx.core as mx
        >>> optimizer = optim.SGD(learning_rate=0.1, momentum=0.9)
        >>> optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.zeros(2)})
        {'w': array([-0.1, -0.1], dtype=float32)}
    """

    slots = ("v",)

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(learning_rate, **options)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dampening = dampening
        self.nesterov = nesterov
        self.rule()

    def hyperparameters(self) -> tuple[str, dict[str, float]]:
        momentum = as_finite("SGD momentum", self.momentum, 0)
        dampening = as_finite("SGD dampening", self.dampening, 0)
        if self.nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening.")
        return "momentum" if momentum > 0 else "sgd", {
            "momentum": momentum,
            "weight_decay": as_finite("SGD weight_decay", self.weight_decay),
            # A group without momentum beside one with it has the other's rule.
            "dampening": dampening if momentum > 0 else 0.0,
            "nesterov": bool(self.nesterov),
        }


class Adam(FusedOptimizer, mlx_optimizers.Adam):
    r"""The Adam optimizer [1]. In detail,

    [1]: Kingma, D.P. and Ba, J., 2015. Adam: A method for stochastic optimization. ICLR 2015.

    .. math::

        m_{t+1} &= \beta_1 m_t + (1 - \beta_1) g_t \\
        v_{t+1} &= \beta_2 v_t + (1 - \beta_2) g_t^2 \\
        w_{t+1} &= w_t - \lambda \frac{m_{t+1}}{\sqrt{v_{t+1}} + \epsilon}

    with :math:`m_{t+1} / (1 - \beta_1^{t+1})` and :math:`v_{t+1} / (1 - \beta_2^{t+1})` in the last
    line if ``bias_correction`` is set.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        betas (Tuple[float, float], optional): The coefficients :math:`(\beta_1, \beta_2)` used for
          computing running averages of the gradient and its square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator to improve
          numerical stability. Default: ``1e-8``
        bias_correction (bool, optional): If set to ``True``, bias correction is applied.
          Default: ``False``
        **options: How state and parameters are stored, what becomes of gradients, averages of the
          weights, and groups of parameters: see :class:`FusedOptimizer`.

    Raises:
        ValueError: an argument is not finite in float32, or out of its range.

    Source: ``mlx.optimizers.Adam``.

    Example:
        >>> import flatstep as optim, mlx.core as mx
        >>> optimizer = optim.Adam(learning_rate=0.1, bias_correction=True)
        >>> optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.zeros(2)})
        {'w': array([-0.1, -0.1], dtype=float32)}
    """

    slots = ("m", "v")

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(learning_rate, **options)
        self.betas: Any = betas
        self.eps = eps
        self.bias_correction = bias_correction
        if type(self).hyperparameters is Adam.hyperparameters:
            self.rule()

    def hyperparameters(self) -> tuple[str, dict[str, float]]:
        return self._adam(0.0)

    def _adam(self, weight_decay: float) -> tuple[str, dict[str, float]]:
        name = type(self).__name__
        beta1, beta2 = as_betas(name, self.betas)
        return "adam", {
            "beta1": beta1,
            "beta2": beta2,
            "eps": as_finite(f"{name} epsilon", self.eps, 0),
            "weight_decay": weight_decay,
            "bias_correction": bool(self.bias_correction),
        }


class AdamW(Adam, mlx_optimizers.AdamW):
    r"""The AdamW optimizer [1]: Adam with a weight decay :math:`\lambda` of its own.

    [1]: Loshchilov, I. and Hutter, F., 2019. Decoupled weight decay regularization. ICLR 2019.

    .. math::

        m_{t+1} &= \beta_1 m_t + (1 - \beta_1) g_t \\
        v_{t+1} &= \beta_2 v_t + (1 - \beta_2) g_t^2 \\
        w_{t+1} &= w_t - \alpha (\frac{m_{t+1}}{\sqrt{v_{t+1}} + \epsilon} + \lambda w_t)

    Args:
        learning_rate (float or callable): The learning rate :math:`\alpha`.
        betas (Tuple[float, float], optional): The coefficients :math:`(\beta_1, \beta_2)` used for
          computing running averages of the gradient and its square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator to improve
          numerical stability. Default: ``1e-8``
        weight_decay (float, optional): The weight decay :math:`\lambda`. Default: ``0.01``.
        bias_correction (bool, optional): If set to ``True``, bias correction is applied, as in
          :class:`Adam`. Default: ``False``
        **options: How state and parameters are stored, what becomes of gradients, averages of the
          weights, and groups of parameters: see :class:`FusedOptimizer`.

    Raises:
        ValueError: an argument is not finite in float32, or out of its range.

    Source: ``mlx.optimizers.AdamW``.

    Example:
        >>> import flatstep as optim, mlx.core as mx
        >>> optimizer = optim.AdamW(learning_rate=0.1, weight_decay=0.1, bias_correction=True)
        >>> optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
        {'w': array([0.89, 0.89], dtype=float32)}
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(learning_rate, betas, eps, bias_correction, **options)
        self.weight_decay = weight_decay
        self.rule()

    def hyperparameters(self) -> tuple[str, dict[str, float]]:
        return self._adam(as_finite(f"{type(self).__name__} weight_decay", self.weight_decay))


class Lion(FusedOptimizer, mlx_optimizers.Lion):
    r"""The Lion optimizer [1]: steps of one size, along the sign of a momentum.

    [1]: Chen, X. et al., 2023. Symbolic Discovery of Optimization Algorithms. arXiv:2302.06675.

    .. math::

        c_{t+1} &= \beta_1 m_t + (1 - \beta_1) g_t \\
        m_{t+1} &= \beta_2 m_t + (1 - \beta_2) g_t \\
        w_{t+1} &= w_t - \eta (\text{sign}(c_{t+1}) + \lambda w_t)

    Its learning rate is best 3 to 10 times smaller than AdamW's, and its weight decay as much
    larger.

    Args:
        learning_rate (float or callable): The learning rate :math:`\eta`.
        betas (Tuple[float, float], optional): The coefficients :math:`(\beta_1, \beta_2)` of the
          direction and of the momentum. Default: ``(0.9, 0.99)``
        weight_decay (float, optional): The weight decay :math:`\lambda`. Default: ``0.0``
        **options: How state and parameters are stored, what becomes of gradients, averages of the
          weights, and groups of parameters: see :class:`FusedOptimizer`.

    Raises:
        ValueError: an argument is not finite in float32, or out of its range.

    Source: ``mlx.optimizers.Lion``.

    Example:
        >>> import flatstep as optim, mlx.core as mx
        >>> optimizer = optim.Lion(learning_rate=0.1, weight_decay=0.1)
        >>> optimizer.apply_gradients({"w": mx.full(2, -7.0)}, {"w": mx.ones(2)})
        {'w': array([1.09, 1.09], dtype=float32)}
    """

    slots = ("m",)

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ):
        super().__init__(learning_rate, **options)
        self.betas: Any = betas
        self.weight_decay = weight_decay
        self.rule()

    def hyperparameters(self) -> tuple[str, dict[str, float]]:
        beta1, beta2 = as_betas("Lion", self.betas)
        weight_decay = as_finite("Lion weight_decay", self.weight_decay)
        # MLX leaves out a decay that is negative.
        numbers = {"beta1": beta1, "beta2": beta2, "weight_decay": max(weight_decay, 0.0)}
        return "lion", numbers


class SGD8bit(SGD):
    """:class:`SGD` with ``state_dtype=mx.int8``: 1.06 bytes of state a parameter, not 4.

    Example:
        >>> import flatstep as optim
        >>> optim.SGD8bit(0.1, momentum=0.9).state_dtype
        mlx.core.int8
    """

    default_state_dtype = "int8"


class Adam8bit(Adam):
    """:class:`Adam` with ``state_dtype=mx.int8``: 2.13 bytes of state a parameter, not 8.

    Example:
        >>> import flatstep as optim
        >>> optim.Adam8bit(1e-3).state_dtype
        mlx.core.int8
    """

    default_state_dtype = "int8"


class AdamW8bit(AdamW):
    """:class:`AdamW` with ``state_dtype=mx.int8``: 2.13 bytes of state a parameter, not 8.

    Example:
        >>> import flatstep as optim
        >>> optim.AdamW8bit(1e-3, master_weight_bits=24).state_dtype
        mlx.core.int8
    """

    default_state_dtype = "int8"


class Lion8bit(Lion):
    """:class:`Lion` with ``state_dtype=mx.int8``: 1.06 bytes of state a parameter, not 4.

    Example:
        >>> import flatstep as optim
        >>> optim.Lion8bit(1e-4).state_dtype
        mlx.core.int8
    """

    default_state_dtype = "int8"
