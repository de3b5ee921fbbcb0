"""The base of the fused optimizers: the interface of ``mlx.optimizers.Optimizer`` on the engine."""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from . import _ext
from .checks import (
    as_learning_rate,
    as_step,
    check_array,
    check_flat_arrays,
    check_layout,
    check_state,
    check_tree,
    misfit,
    with_state,
)
from .layout import FLOATING, Layout, Segment, name_of, single_step
from .schedulers import plain_schedule
from .state import State
from .trees import matching_part
from .walk import plain

LearningRate = float | mx.array | Callable[[mx.array], mx.array]


class FlatUpdate(NamedTuple):
    """What ``flat_update`` returns: arrays for the next call."""

    parameter: mx.array
    state: tuple[mx.array, ...]
    step: mx.array
    learning_rate: mx.array


class FusedOptimizer(Optimizer):
    """What the optimizers here share: an ``mlx.optimizers.Optimizer`` whose update is one pass.

    Each is a subclass of its namesake in MLX too, for ``isinstance`` only: ``Optimizer`` is named
    here where ``super()`` would be that class.

    Args:
        learning_rate (float or callable): The learning rate, or a schedule of it.
        state_dtype (mx.Dtype, optional): How the state is stored: ``mx.float32``, ``mx.float16`` or
          ``mx.bfloat16``. Default: ``mx.float32``, whatever the parameters are. (MLX stores the
          state in the parameters' dtype; a bfloat16 ``v`` can't decay, since 0.999 v rounds to v.)
    """

    # The names of the state that a rule keeps for each parameter, in the engine's order.
    slots: tuple[str, ...] = ()

    def __init__(self, learning_rate: LearningRate, state_dtype: mx.Dtype | None = None):
        Optimizer.__init__(self)
        if state_dtype is not None and state_dtype not in FLOATING:
            wanted = "mx.float32, mx.float16 or mx.bfloat16"
            raise ValueError(misfit("state_dtype", wanted, repr(state_dtype)))
        self._state = State(self._state)
        # By name: an mx.Dtype can be neither copied nor pickled.
        self._state_dtype_name = name_of(state_dtype or mx.float32)
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
        layout, flat = state.make_flat(parameters, self.slots, self.state_dtype)
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
            flat = {slot: state.flat_arrays(slot) for slot in self.slots}
            result = self._step(layout, flat, gradients, parameters, scheduled)
        if layout is None or result is None:
            # The first step, or parameters were cast since `init`: lay them out as they are.
            part = matching_part(gradients, parameters)
            layout, flat = state.make_flat(part, self.slots, self.state_dtype)
            result = self._step(layout, flat, gradients, parameters, scheduled)
            assert result is not None
        updated, slots, step, learning_rate = result

        scalars = {**scheduled, "step": step}
        if learning_rate is not None:
            scalars["learning_rate"] = learning_rate
        state.commit(layout, {**flat, **dict(zip(self.slots, slots, strict=False))}, scalars)
        self._initialized = True
        return updated

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Initialize the state of one parameter; for subclasses that extend it."""
        check_array("init_single: parameter", parameter)
        for slot in self.slots:
            state[slot] = mx.zeros(parameter.shape, self.state_dtype)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        """Update one parameter and its state; for subclasses that extend it.

        As in MLX, ``self.step`` counts this step already.
        """
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
        if layout is not None and layout.slots != self.slots:
            raise ValueError(
                f"state of an optimizer that keeps {', '.join(layout.slots)} was set on "
                f"{type(self).__name__}, which keeps {', '.join(self.slots)}"
            )
        self._state = adopted.in_dtype(self.state_dtype) if layout else adopted
        self._initialized = layout is not None

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate of the last step, or the one set since. A float32 scalar."""
        rate: mx.array = self.state["learning_rate"]
        return rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.state["learning_rate"] = copy(as_learning_rate(learning_rate))

    # ---- What flatstep adds ----

    @property
    def layout(self) -> list[Segment]:
        """Where each parameter and its state lie in flat memory, in the order of the tree.

        Empty before ``init``. Offsets and sizes count elements of the bucket's flat arrays.
        """
        layout = self._layout
        return layout.segments() if layout else []

    def is_flat(self, parameters: Any) -> bool:
        """Whether the parameters lie in the flat buffers as a step leaves them.

        If so, and if nobody else holds them, the next step updates them in place. Evaluates the
        parameters.

        Args:
            parameters (dict): A Python tree of parameters, or a part of it.

        Raises:
            TypeError: the tree is no dict, or a leaf no array.
            ValueError: the tree does not fit the layout; the message names the path.
        """
        tree = with_state(parameters.parameters() if isinstance(parameters, Module) else parameters)
        layout = self._layout
        return layout is not None and _ext.are_flat(layout.engine, layout.skeleton, tree)

    def flat_update(
        self,
        parameter: mx.array,
        gradient: mx.array,
        *state: mx.array,
        step: int | mx.array,
        learning_rate: float | mx.array | None = None,
    ) -> FlatUpdate:
        """One step of one flat array, for those who keep their own buffers.

        The optimizer gives the rule, its hyperparameters and the schedule; its own state is neither
        read nor changed. Arrays that nobody else holds are updated in place once the parameter is
        one that this call returned.

        Args:
            parameter (mx.array): shape (n,), float32, float16 or bfloat16.
            gradient (mx.array): shape (n,), any of these dtypes.
            *state (mx.array): the arrays named by ``optimizer.slots``, shape (n,), any of these
              dtypes. SGD without momentum takes none.
            step (int or mx.array): steps taken so far, an int >= 0 or an integer scalar.
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
        names = self.slots[: rule.num_states]
        if len(state) != len(names):
            raise ValueError(
                f"flat_update: {type(self).__name__} takes {len(names)} state arrays "
                f"{names}, {len(state)} were provided"
            )
        slots = dict(zip(names, state, strict=True))
        check_flat_arrays({"parameter": parameter, "gradient": gradient, **slots})
        count = as_step(step)
        plain = None
        if learning_rate is None:
            plain = self._plain_schedule()
            if plain is None:
                schedule = self._schedulers.get("learning_rate")
                learning_rate = schedule(count) if schedule else self.learning_rate
        rate = None if learning_rate is None else as_learning_rate(learning_rate)
        updated, values, next_step, scheduled = single_step(
            parameter, gradient, rule, plain, state, count, rate
        )
        rate = rate if scheduled is None else scheduled
        assert rate is not None
        return FlatUpdate(updated, values, next_step, rate)

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
    ) -> tuple[Any, list[list[mx.array]], mx.array, mx.array | None] | None:
        rule = self.rule()
        plain = self._plain_schedule()
        rate = None
        if plain is None:
            rate = scheduled.get("learning_rate")
            rate = as_learning_rate(self.learning_rate) if rate is None else rate
        return _ext.step(
            layout.engine,
            layout.skeleton,
            gradients,
            parameters,
            rule,
            plain,
            [flat[slot] for slot in self.slots[: rule.num_states]],
            as_step(self.step),
            rate,
        )

    @property
    def _layout(self) -> Layout | None:
        return self._state.layout if isinstance(self._state, State) else None

    @property
    def state_dtype(self) -> mx.Dtype:
        """How the state is stored; chosen when the optimizer is made."""
        dtype: mx.Dtype = getattr(mx, self._state_dtype_name)
        return dtype

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
