"""The base of the fused optimizers: the interface of ``mlx.optimizers.Optimizer`` on the engine."""

from collections.abc import Callable
from copy import copy
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from . import _ext
from .additions import Additions
from .checks import (
    as_learning_rate,
    as_step,
    check_array,
    check_layout,
    check_state,
    check_tree,
)
from .layout import Layout, single_step
from .precision import Precision
from .schedulers import plain_schedule
from .slots import MASTER
from .state import State
from .trees import matching_part
from .walk import plain

LearningRate = float | mx.array | Callable[[mx.array], mx.array]


class FusedOptimizer(Additions):
    """What the optimizers here share: an ``mlx.optimizers.Optimizer`` whose update is one pass.

    Each is a subclass of its namesake in MLX too, for ``isinstance`` only: ``Optimizer`` is named
    here where ``super()`` would be that class.

    Args:
        learning_rate (float or callable): The learning rate, or a schedule of it.
        state_dtype (mx.Dtype, optional): How the state is stored: ``mx.float32``, ``mx.float16``,
          ``mx.bfloat16``, or ``mx.int8`` for 8-bit codes with a float32 scale for each 64 of them.
          Default: ``mx.float32``, whatever the parameters are, and ``mx.int8`` for the optimizers
          whose names end in ``8bit``. (MLX stores the state in the parameters' dtype; a bfloat16
          ``v`` can't decay, since 0.999 v rounds to v.)
        master_weight_bits (int, optional): ``24`` or ``32``: what float16 and bfloat16 parameters
          lack of weights with so many bits is kept beside them, in 8 or 16 bits, so that steps too
          small for the parameter add up. See :meth:`master_weights`. Default: ``None``
        stochastic_rounding (bool, optional): Round float16 and bfloat16 parameters up or down by
          chance, so that small steps are taken in the mean, at no bytes. Default: ``False``
        full_precision (callable, optional): ``(path, parameter) -> bool``: which parameters keep
          float32 state under ``state_dtype=mx.int8``, besides those with fewer than 4,096 elements.
        seed (int, optional): Of all that is rounded by chance. Default: ``0``

    Raises:
        ValueError: an argument is not one of those.

    Example:
        >>> import flatstep as optim, mlx.core as mx
        >>> optimizer = optim.AdamW(1e-5, master_weight_bits=24, state_dtype=mx.int8)
        >>> optimizer.init({"w": mx.zeros((64, 64), mx.bfloat16)})
        >>> list(optimizer.state["w"])
        ['m', 'v', 'master']
    """

    # The names of the state that a rule keeps for each parameter, in the engine's order.
    slots: tuple[str, ...] = ()
    # What `state_dtype` is if it is not said.
    default_state_dtype = "float32"

    def __init__(
        self,
        learning_rate: LearningRate,
        state_dtype: mx.Dtype | None = None,
        master_weight_bits: int | None = None,
        stochastic_rounding: bool = False,
        full_precision: Callable[[str, mx.array], bool] | None = None,
        seed: int = 0,
    ):
        Optimizer.__init__(self)
        self._precision = Precision.of(
            state_dtype or getattr(mx, self.default_state_dtype),
            master_weight_bits,
            stochastic_rounding,
            full_precision,
            seed,
        )
        self._state = State(self._state)
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
            parameters (dict): A Python tree of parameters: arrays in dicts, lists and tuples, or an
              ``mlx.nn.Module``. Those that are not float32, float16 or bfloat16, such as quantized
              weights, get no state, and a step takes no gradient for them.

        Raises:
            TypeError: a parameter is not an array; the message names it.
            ValueError: state that was loaded does not fit the parameters; the message names where.

        Source: ``mlx.optimizers.Optimizer.init``.

        Example:
            >>> import flatstep as optim, mlx.nn as nn
            >>> optimizer = optim.SGD(learning_rate=1e-1, momentum=0.9)
            >>> optimizer.init(nn.Linear(2, 2).trainable_parameters())
            >>> optimizer.state.keys()
            dict_keys(['step', 'learning_rate', 'weight', 'bias'])
        """
        check_tree("parameters", parameters)
        state = self._usable_state()
        if self._is_customised:
            self._state = State(plain(state))
            Optimizer.init(self, parameters)
            return
        layout, flat = state.make_flat(parameters, self._form)
        check_layout(state.layout, layout)
        state.commit(layout, flat, {})
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
        check_tree("gradients", gradients)
        check_tree("parameters", parameters)
        if self._is_customised:
            self._usable_state()
            return Optimizer.apply_gradients(self, gradients, parameters)
        if type(self).init is not FusedOptimizer.init and not self._initialized:
            self.init(matching_part(gradients, parameters))

        state = self._usable_state()
        scheduled = self._scheduled_values()
        layout = state.layout if self._initialized else None
        result = None
        if layout is not None:
            flat = {slot: state.flat_arrays(slot) for slot in layout.form.flat_slots}
            result = self._step(layout, flat, gradients, parameters, scheduled)
        if layout is None or result is None:
            # The first step, or parameters were cast since `init`: lay them out as they are.
            part = matching_part(gradients, parameters)
            layout, flat = state.make_flat(part, self._form)
            result = self._step(layout, flat, gradients, parameters, scheduled)
            assert result is not None
        updated, written, step, learning_rate = result

        scalars = {**scheduled, "step": step}
        if learning_rate is not None:
            scalars["learning_rate"] = learning_rate
        state.commit(layout, {**flat, **written}, scalars)
        self._initialized = True
        return updated

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Initialize the state of one parameter; for subclasses that extend it."""
        check_array("init_single: parameter", parameter)
        self._precision.check_plain(f"{type(self).__name__}: init_single")
        for slot in self.slots:
            state[slot] = mx.zeros(parameter.shape, self.state_dtype)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        """Update one parameter and its state; for subclasses that extend it.

        As in MLX, ``self.step`` counts this step already.
        """
        self._precision.check_plain(f"{type(self).__name__}: apply_single")
        rule = self.rule()
        used = self.slots[: rule.num_states]
        for name, array in (("gradient", gradient), ("parameter", parameter)):
            check_array(f"apply_single: {name}", array)
        updated, values, _, _ = single_step(
            parameter,
            gradient,
            rule,
            None,
            [state[slot] for slot in used],
            self.step - mx.array(1, mx.uint64),
            as_learning_rate(self.learning_rate),
            self._precision.rounding,
            self._precision.seed,
        )
        state.update(zip(used, values, strict=True))
        return updated

    @property
    def state(self) -> Any:
        """The optimizer's state: ``step`` (uint64), ``learning_rate`` (float32) and a tree of the
        parameters' structure with a dict of arrays for each parameter.

        The arrays are made when asked for: assign new ones, editing them in place changes nothing
        here. Set it to a tree of this optimizer or of its class in MLX, or to what a compiled
        function returned.
        """
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        adopted = State.adopt(state)
        layout = adopted.layout if isinstance(adopted, State) else None
        if isinstance(adopted, State) and "learning_rate" in adopted:
            as_learning_rate(adopted["learning_rate"])
        if layout is not None and layout.form.slots != self.slots:
            raise ValueError(
                f"state of an optimizer that keeps {', '.join(layout.form.slots)} was set on "
                f"{type(self).__name__}, which keeps {', '.join(self.slots)}"
            )
        self._state = adopted.in_form(self._form) if layout else adopted
        self._initialized = layout is not None

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate of the last step, or the one set since. A float32 scalar."""
        rate: mx.array = self.state["learning_rate"]
        return rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.state["learning_rate"] = copy(as_learning_rate(learning_rate))

    # ---- Inner workings ----

    @property
    def _is_customised(self) -> bool:
        """A subclass that has its own way with a single parameter gets MLX's loop over them."""
        names = ("apply_single", "init_single")
        return any(
            name in vars(self) or getattr(type(self), name) is not getattr(FusedOptimizer, name)
            for name in names
        )

    def _step(
        self,
        layout: Layout,
        flat: dict[str, list[mx.array]],
        gradients: Any,
        parameters: Any,
        scheduled: dict[str, mx.array],
    ) -> tuple[Any, dict[str, list[mx.array]], mx.array, mx.array | None] | None:
        rule, precision = self.rule(), self._precision
        slots = self.slots[: rule.num_states]
        if precision.master_weight_bits:
            slots = (*slots, MASTER)
        plain = self._plain_schedule()
        rate = None
        if plain is None:
            rate = scheduled.get("learning_rate")
            rate = as_learning_rate(self.learning_rate) if rate is None else rate
        result = _ext.step(
            layout.engine,
            layout.skeleton,
            gradients,
            parameters,
            rule,
            plain,
            [flat[slot] for slot in slots],
            as_step(self.step),
            rate,
            precision.rounding,
            precision.seed,
        )
        if result is None:
            return None
        updated, written, step, learning_rate = result
        return updated, dict(zip(slots, written, strict=True)), step, learning_rate

    def _plain_schedule(self) -> _ext.PlainSchedule | None:
        schedule = self._schedulers.get("learning_rate")
        return plain_schedule(schedule) if schedule else None

    def _scheduled_values(self) -> dict[str, mx.array]:
        """What the schedules that only MLX operations can evaluate give for this step."""
        values = {}
        for name, schedule in self._schedulers.items():
            if name != "learning_rate":
                values[name] = schedule(self.step)
            elif self._plain_schedule() is None:
                values[name] = as_learning_rate(schedule(self.step))
        return values

    def _maybe_schedule(self, name: str, parameter: Any) -> None:
        if name != "learning_rate":
            Optimizer._maybe_schedule(self, name, parameter)
        elif callable(parameter):
            self._schedulers[name] = parameter
            plain = plain_schedule(parameter)
            self.state[name] = as_learning_rate(plain(0) if plain else parameter(self.step))
        else:
            self.learning_rate = parameter

    def _usable_state(self) -> State:
        state = self._state
        check_state(state)
        assert isinstance(state, State)
        return state
