"""SGD, Adam and AdamW with the interface of ``mlx.optimizers``, on the fused engine."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map

from . import _ext
from .layout import FLOATING, Layout, Segment
from .schedulers import plain_schedule
from .state import State

LearningRate = Union[float, mx.array, Callable[[mx.array], mx.array]]


class FlatUpdate(NamedTuple):
    """What ``flat_update`` returns: arrays for the next call."""

    parameter: mx.array
    state: Tuple[mx.array, ...]
    step: mx.array
    learning_rate: mx.array


class FusedOptimizer(Optimizer):
    """What SGD, Adam and AdamW share: an ``mlx.optimizers.Optimizer`` whose update is one pass.

    Args:
        learning_rate (float or callable): The learning rate, or a schedule of it.
        state_dtype (mx.Dtype, optional): How the state is stored: ``mx.float32``, ``mx.float16`` or
          ``mx.bfloat16``. Default: ``mx.float32``, whatever the parameters are. (MLX stores the
          state in the parameters' dtype; a bfloat16 ``v`` can't decay, since 0.999 v rounds to v.)
    """

    # The names of the state that a rule keeps for each parameter, in the engine's order.
    slots: Tuple[str, ...] = ()

    def __init__(self, learning_rate: LearningRate, state_dtype: Optional[mx.Dtype] = None):
        super().__init__()
        if state_dtype is not None and state_dtype not in FLOATING:
            raise ValueError(
                f"state_dtype should be mx.float32, mx.float16 or mx.bfloat16, {state_dtype!r} was "
                "provided instead"
            )
        self._state = State(self._state)
        # By name: an mx.Dtype can be neither copied nor pickled.
        self._state_dtype_name = str(state_dtype or mx.float32).rsplit(".", 1)[-1]
        self._maybe_schedule("learning_rate", learning_rate)

    def rule(self) -> _ext.Rule:
        """The engine's form of the hyperparameters as they are now.

        Raises:
            ValueError: a hyperparameter is out of its range.
        """
        raise NotImplementedError

    # ---- The interface of mlx.optimizers ----

    def init(self, parameters: Any) -> None:
        """Initialize the optimizer's state.

        Parameters that have state already keep it, so this may be called again after parameters
        were added, or after a state was loaded.

        Args:
            parameters (dict): A Python tree of parameters: float32, float16 or bfloat16 arrays in
              dicts, lists and tuples, or an ``mlx.nn.Module``.

        Raises:
            TypeError: a parameter is not an array, or has another dtype; the message names it.
            ValueError: state that was loaded has another shape than its parameter.

        Source: ``mlx.optimizers.Optimizer.init``.

        Example:
            >>> import flatstep as optim, mlx.nn as nn
            >>> optimizer = optim.SGD(learning_rate=1e-1, momentum=0.9)
            >>> optimizer.init(nn.Linear(2, 2).trainable_parameters())
            >>> optimizer.state.keys()
            dict_keys(['step', 'learning_rate', 'weight', 'bias'])
        """
        if self._is_customised:
            self._state = self._plain_state()
            super().init(parameters)
            return
        state = self._usable_state()
        state.set_flat(*state.make_flat(parameters, self.slots, self._state_dtype))
        self._initialized = True

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Apply the gradients to the parameters and return the updated parameters.

        Args:
            gradients (dict): A Python tree of gradients: float32, float16 or bfloat16 arrays of any
              layout in memory. It may cover a part of the parameters; the rest, and its state,
              stays as it is.
            parameters (dict): A Python tree of parameters, a superset of the gradients.

        Returns:
            A tree of the structure of the gradients, each leaf with its parameter's shape and
            dtype. Where nobody else holds the old parameters their memory is reused.

        Raises:
            ValueError: a shape does not match, or a gradient has no parameter or no state; the
              message names the path. Nothing is changed.
            TypeError: a leaf is not an array, or has a dtype that is not supported.

        Source: ``mlx.optimizers.Optimizer.apply_gradients``.

        Example:
            >>> import flatstep as optim, mlx.core as mx
            >>> optimizer = optim.SGD(learning_rate=0.5)
            >>> optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.zeros(2)})
            {'w': array([-0.5, -0.5], dtype=float32)}
        """
        if self._is_customised:
            return super().apply_gradients(gradients, parameters)
        if type(self).init is not FusedOptimizer.init and not self._initialized:
            self.init(_like(gradients, parameters))

        state = self._usable_state()
        layout = state.layout
        if layout is None or not self._initialized:
            layout, flat = state.make_flat(
                _like(gradients, parameters), self.slots, self._state_dtype
            )
        else:
            flat = {slot: state.flat_arrays(slot) for slot in self.slots}
        scheduled = self._scheduled_values()
        result = self._step(layout, flat, gradients, parameters, scheduled)
        if result is None:
            # Parameters were cast since `init`: lay them out for their new dtypes.
            layout, flat = state.make_flat(
                _like(gradients, parameters), self.slots, self._state_dtype
            )
            result = self._step(layout, flat, gradients, parameters, scheduled)
            assert result is not None
        updated, slots, step, learning_rate = result

        for name, value in scheduled.items():
            dict.__setitem__(state, name, value)
        dict.__setitem__(state, "step", step)
        if learning_rate is not None:
            dict.__setitem__(state, "learning_rate", learning_rate)
        state.set_flat(layout, {**flat, **dict(zip(self.slots, slots))})
        self._initialized = True
        return updated

    def init_single(self, parameter: mx.array, state: Dict[str, Any]) -> None:
        """Initialize the state of one parameter; for subclasses that extend it."""
        for slot in self.slots:
            state[slot] = mx.zeros(parameter.shape, self._state_dtype)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: Dict[str, Any]
    ) -> mx.array:
        """Update one parameter and its state; for subclasses that extend it.

        As in MLX, ``self.step`` counts this step already.
        """
        rule = self.rule()
        used = self.slots[: rule.num_slots]
        updated, values, _, _ = _ext.single_step(
            parameter,
            gradient,
            [state[slot] for slot in used],
            rule,
            None,
            self.step - mx.array(1, mx.uint64),
            _as_learning_rate(self.learning_rate),
        )
        state.update(zip(used, values))
        return updated

    @property
    def state(self) -> Any:
        """The optimizer's state: ``step`` (uint64), ``learning_rate`` (float32) and a tree of the
        parameters' structure with a dict of arrays for each parameter.

        The arrays are views of the flat state, made when asked for. Set it to a tree of this
        optimizer, of the same class of ``mlx.optimizers``, or to what a compiled function returned.
        """
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = State.adopt(state)
        self._initialized = isinstance(self._state, State) and self._state.layout is not None

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate of the last step, or the one set since. A float32 scalar."""
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: Union[float, mx.array]) -> None:
        self.state["learning_rate"] = _as_learning_rate(learning_rate)

    # ---- What flatstep adds ----

    @property
    def layout(self) -> List[Segment]:
        """Where each parameter and its state lie in flat memory, in the order of the tree.

        Empty before ``init``. Offsets and sizes count elements of the bucket's flat arrays.
        """
        layout = self._state.layout if isinstance(self._state, State) else None
        return layout.segments() if layout else []

    def is_flat(self, parameters: Any) -> bool:
        """Whether the parameters lie in the flat buffers as a step leaves them.

        If so, and if nobody else holds them, the next step updates them in place. Evaluates the
        parameters.

        Args:
            parameters (dict): A Python tree of parameters, or a part of it.

        Raises:
            ValueError: the tree does not fit the layout; the message names the path.
        """
        layout = self._state.layout if isinstance(self._state, State) else None
        if layout is None:
            return False
        mx.eval(parameters)
        return _ext.are_flat(layout.engine, layout.skeleton, _arrays_only(parameters))

    def flat_update(
        self,
        parameter: mx.array,
        gradient: mx.array,
        *state: mx.array,
        step: Union[int, mx.array],
        learning_rate: Optional[Union[float, mx.array]] = None,
    ) -> FlatUpdate:
        """One step of one flat array, for those who keep their own buffers.

        The optimizer gives the rule, its hyperparameters and the schedule; its own state is neither
        read nor changed. Arrays that nobody else holds are updated in place once the parameter is
        one that this call returned.

        Args:
            parameter (mx.array): shape (n,), float32, float16 or bfloat16.
            gradient (mx.array): shape (n,), any of these dtypes.
            *state (mx.array): the arrays named by ``optimizer.slots`` (SGD: ``v``; Adam and AdamW:
              ``m``, ``v``), shape (n,), any of these dtypes. SGD without momentum takes none.
            step (int or mx.array): steps taken so far, an int >= 0 or a uint64 scalar.
            learning_rate (float or mx.array, optional): Default: the optimizer's schedule at
              ``step``, or its learning rate.

        Returns:
            FlatUpdate: ``(parameter, state, step, learning_rate)`` after the step.

        Raises:
            ValueError: a shape or the number of state arrays does not match, or ``step`` is
              negative.
            TypeError: a dtype is not supported.

        Example:
            >>> import flatstep as optim, mlx.core as mx
            >>> optimizer = optim.SGD(learning_rate=0.5, momentum=0.9)
            >>> p, (v,), step, _ = optimizer.flat_update(
            ...     mx.zeros(3), mx.ones(3), mx.zeros(3), step=0
            ... )
            >>> p
            array([-0.5, -0.5, -0.5], dtype=float32)
        """
        rule = self.rule()
        names = self.slots[: rule.num_slots]
        if len(state) != len(names):
            raise ValueError(
                f"flat_update: {type(self).__name__} takes {len(names)} state arrays "
                f"{names}, {len(state)} were provided"
            )
        arrays = {"parameter": parameter, "gradient": gradient, **dict(zip(names, state))}
        for name, array in arrays.items():
            if not isinstance(array, mx.array):
                raise TypeError(f"flat_update: {name} should be an mlx.core.array, got {array!r}")
            if array.ndim != 1 or array.shape != parameter.shape:
                raise ValueError(
                    f"flat_update: {name} of shape {tuple(array.shape)} should be one-dimensional "
                    f"and as long as the parameter {tuple(parameter.shape)}"
                )
            if array.dtype not in FLOATING:
                raise TypeError(
                    f"flat_update: {name} has dtype {array.dtype}; float32, float16 and bfloat16 "
                    "are supported"
                )
        count = _as_step(step)
        plain = None
        if learning_rate is None:
            plain = self._plain_schedule()
            if plain is None:
                schedule = self._schedulers.get("learning_rate")
                learning_rate = schedule(count) if schedule else self.learning_rate
        rate = None if learning_rate is None else _as_learning_rate(learning_rate)
        updated, values, next_step, scheduled = _ext.single_step(
            parameter, gradient, list(state), rule, plain, count, rate
        )
        return FlatUpdate(updated, tuple(values), next_step, rate if plain is None else scheduled)

    # ---- Inner workings ----

    @property
    def _is_customised(self) -> bool:
        """A subclass that has its own way with a single parameter gets MLX's loop over them."""
        kind = type(self)
        return (
            kind.apply_single is not FusedOptimizer.apply_single
            or kind.init_single is not FusedOptimizer.init_single
        )

    def _step(
        self,
        layout: Layout,
        flat: Dict[str, List[mx.array]],
        gradients: Any,
        parameters: Any,
        scheduled: Dict[str, mx.array],
    ) -> Optional[Tuple[Any, List[List[mx.array]], mx.array, Optional[mx.array]]]:
        rule = self.rule()
        plain = self._plain_schedule()
        rate = None
        if plain is None:
            rate = scheduled.get("learning_rate")
            rate = _as_learning_rate(self.learning_rate) if rate is None else rate
        return _ext.step(
            layout.engine,
            layout.skeleton,
            gradients,
            parameters,
            rule,
            plain,
            [flat[slot] for slot in self.slots[: rule.num_slots]],
            _as_step(self.step),
            rate,
        )

    @property
    def _state_dtype(self) -> mx.Dtype:
        return getattr(mx, self._state_dtype_name)

    def _plain_schedule(self) -> Optional[_ext.PlainSchedule]:
        schedule = self._schedulers.get("learning_rate")
        return plain_schedule(schedule) if schedule else None

    def _scheduled_values(self) -> Dict[str, mx.array]:
        """What the schedules that only MLX operations can evaluate give for this step."""
        values = {}
        for name, schedule in self._schedulers.items():
            if name != "learning_rate":
                values[name] = schedule(self.step)
            elif self._plain_schedule() is None:
                values[name] = _as_learning_rate(schedule(self.step))
        return values

    def _maybe_schedule(self, name: str, parameter: Any) -> None:
        if name != "learning_rate":
            super()._maybe_schedule(name, parameter)
        elif callable(parameter):
            self._schedulers[name] = parameter
            plain = plain_schedule(parameter)
            self.state[name] = _as_learning_rate(plain(0) if plain else parameter(self.step))
        else:
            self.state[name] = _as_learning_rate(parameter)

    def _usable_state(self) -> State:
        state = self._state
        if not isinstance(state, State):
            raise TypeError(
                f"optimizer.state should be a dict, it was set to a {type(state).__name__}"
            )
        for key in ("step", "learning_rate"):
            if key not in state:
                raise ValueError(f"optimizer.state has no {key!r}; it was set to {state!r}")
        return state

    def _plain_state(self) -> State:
        """The state as MLX's own loop wants it: nothing flat."""
        return State(self._state._tree()) if isinstance(self._state, State) else self._state


class SGD(FusedOptimizer):
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
        state_dtype (mx.Dtype, optional): How ``v`` is stored. Default: ``mx.float32``

    Raises:
        ValueError: an argument is NaN, infinite or out of its range.

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
        *,
        state_dtype: Optional[mx.Dtype] = None,
    ):
        super().__init__(learning_rate, state_dtype)
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dampening = dampening
        self.nesterov = nesterov
        self.rule()

    def rule(self) -> _ext.Rule:
        return _ext.sgd_rule(
            _number("SGD momentum", self.momentum),
            _number("SGD weight_decay", self.weight_decay),
            _number("SGD dampening", self.dampening),
            bool(self.nesterov),
        )


class Adam(FusedOptimizer):
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
        state_dtype (mx.Dtype, optional): How ``m`` and ``v`` are stored. Default: ``mx.float32``

    Raises:
        ValueError: an argument is NaN, infinite or out of its range.

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
        *,
        state_dtype: Optional[mx.Dtype] = None,
    ):
        super().__init__(learning_rate, state_dtype)
        self.betas = betas
        self.eps = eps
        self.bias_correction = bias_correction
        self._adam_rule(0.0)

    def rule(self) -> _ext.Rule:
        return self._adam_rule(0.0)

    def _adam_rule(self, weight_decay: float) -> _ext.Rule:
        name = type(self).__name__
        return _ext.adam_rule(
            [_number(f"{name} beta{i + 1}", beta) for i, beta in enumerate(self.betas)],
            _number(f"{name} epsilon", self.eps),
            _number(f"{name} weight_decay", weight_decay),
            bool(self.bias_correction),
            name,
        )


class AdamW(Adam):
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
        state_dtype (mx.Dtype, optional): How ``m`` and ``v`` are stored. Default: ``mx.float32``

    Raises:
        ValueError: an argument is NaN, infinite or out of its range.

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
        *,
        state_dtype: Optional[mx.Dtype] = None,
    ):
        super().__init__(learning_rate, betas, eps, bias_correction, state_dtype=state_dtype)
        self.weight_decay = weight_decay
        self.rule()

    def rule(self) -> _ext.Rule:
        return self._adam_rule(self.weight_decay)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} should be a number, {value!r} was provided instead") from None


def _as_learning_rate(value: Any) -> mx.array:
    """A float32 scalar, as the kernels read it."""
    if isinstance(value, mx.array):
        if value.size != 1 or value.dtype == mx.complex64:
            raise ValueError(
                f"learning_rate should be one real number, an array of shape {tuple(value.shape)} "
                f"and {value.dtype} was provided instead"
            )
        if value.dtype == mx.float32 and value.ndim == 0:
            return value
        return value.astype(mx.float32).reshape(())
    number = _number("learning_rate", value)
    if not math.isfinite(number):
        raise ValueError(f"learning_rate should be finite, {value} was provided instead")
    return mx.array(number, mx.float32)


def _as_step(value: Any) -> mx.array:
    if isinstance(value, mx.array):
        if value.size != 1 or not mx.issubdtype(value.dtype, mx.integer):
            raise ValueError(
                f"step should be one whole number, an array of shape {tuple(value.shape)} and "
                f"{value.dtype} was provided instead"
            )
        if value.dtype == mx.uint64 and value.ndim == 0:
            return value
        return value.astype(mx.uint64).reshape(())
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"step should be a whole number >= 0, {value!r} was provided instead")
    return mx.array(value, mx.uint64)


def _like(gradients: Any, parameters: Any, path: str = "") -> Any:
    """The part of the parameters that the gradients cover."""
    if isinstance(gradients, mx.array):
        return parameters
    if isinstance(gradients, dict):
        items: Any = gradients.items()
    elif isinstance(gradients, (list, tuple)):
        items = enumerate(gradients)
    else:
        raise TypeError(
            f"{path or 'the tree'}: a gradient should be an mlx.core.array, found "
            f"{type(gradients).__name__}"
        )
    result = {}
    for key, child in items:
        here = f"{path}.{key}" if path else str(key)
        try:
            result[key] = _like(child, parameters[key], here)
        except (KeyError, IndexError):
            if tree_flatten(child):
                raise ValueError(
                    f"{here}: there is a gradient but no parameter of this name"
                ) from None
            result[key] = child
    if isinstance(gradients, dict):
        return result
    return type(gradients)(*result.values()) if hasattr(gradients, "_fields") else type(
        gradients
    )(result.values())


def _arrays_only(parameters: Any) -> Any:
    """A module as the tree of its parameters; any other tree as it is."""
    return parameters.parameters() if hasattr(parameters, "parameters") else tree_map(
        lambda leaf: leaf, parameters
    )
