"""The base of the fused optimizers: the interface of ``mlx.optimizers.Optimizer`` on the engine."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from . import _ext
from .checks import (
    as_learning_rate,
    check_array,
    check_layout,
    check_tree,
    with_state,
)
from .groups import Groups
from .layout import single_step
from .precision import Precision, StorageOptions
from .state import State
from .step_options import Options, Pass, defaults_of
from .stepping import Stepping
from .trees import matching_part
from .walk import plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

LearningRate = float | mx.array | Callable[[mx.array], mx.array]


class FusedOptimizer(Stepping):
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
        max_grad_norm (float, optional): Gradients are multiplied by ``min(1, max_grad_norm / (norm
          + 1e-6))`` as they are read, where ``norm`` is the 2-norm of all of them (after
          ``grad_scale`` and ``clip_value``; those of frozen groups left out). The state has it as
          ``grad_norm``. ``inf`` does not clip.
        norm_group (mx.distributed.Group, optional): Over which gradients are sharded: the squares
          are summed over it.
        clip_value (float, optional): Clip each element of the gradients to ``[-clip_value,
          clip_value]``.
        skip_nonfinite (bool, optional): A step whose gradients are not all finite, or whose norm is
          not, changes nothing but ``state["skipped_steps"]``. Default: ``False``
        grad_scale (float or mx.array or DynamicLossScale, optional): What gradients are multiplied
          by as they are read.
        accumulate_steps (int, optional): Sum gradients up, and take a step with their average at
          every so many calls. See :meth:`accumulate`.
        accumulate_dtype (mx.Dtype, optional): Of the sums: ``mx.float32``, or ``mx.bfloat16``,
          rounded by chance. Default: ``mx.float32``
        ema (float, optional): Keep an average of the weights, ``ema average + (1 - ema) weight``.
          See :meth:`ema_weights`.
        ema_start (int, optional): The average is the weights themselves up to this step; with
          ``0`` it starts from those that ``init`` was given, so load weights before. Default: ``0``
        ema_every (int, optional): It takes the weights in every so many steps. Default: ``1``
        ema_dtype (mx.Dtype, optional): Of the average: ``mx.float32``, or ``mx.bfloat16``, rounded
          by chance. Default: ``mx.float32``
        groups (list of Group, optional): Parameters with other hyperparameters.

    Raises:
        ValueError: an argument is out of its range, or says more of one that is not there.
        TypeError: an argument is of another type, or there is none of its name.

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
        **options: Unpack[Options],
    ):
        Optimizer.__init__(self)
        unknown = options.keys() - Options.__annotations__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected argument {min(unknown)!r}")
        of_storage: Any = {k: v for k, v in options.items() if k in StorageOptions.__annotations__}
        state_dtype = of_storage.pop("state_dtype", None)
        state_dtype = state_dtype or getattr(mx, self.default_state_dtype)
        self._precision = Precision.of(state_dtype, **of_storage)
        of_step: Any = {k: v for k, v in options.items() if k not in StorageOptions.__annotations__}
        self._pass = Pass.of(of_step)
        self._groups = Groups(options.get("groups", ()))
        scalars = {name: default() for name, default in defaults_of(self._pass).items()}
        self._state = State({**self._state, **scalars})
        scale: Any = options.get("grad_scale")
        if scale is not None and self._pass.loss_scale is None:
            self.grad_scale = scale
        self._maybe_schedule("learning_rate", learning_rate)
        if self._groups:
            self._state["group_learning_rates"] = self._groups.initial_rates(self.learning_rate)

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
            self._check_without(f"{type(self).__name__}: init_single")
            self._state = State(plain(state))
            Optimizer.init(self, parameters)
            return
        layout, flat = state.make_flat(parameters, self._form)
        check_layout(state.layout, layout)
        self._leaf_groups(layout, parameters)  # while there are weights to look at
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
        if self._pass.accumulate_dtype:
            if state.layout is None:
                laid_out = state.make_flat(matching_part(gradients, parameters), self._form)
                state = State(dict.items(state))
                state.commit(*laid_out, {})
            state = self._added(state, gradients, parameters)
        return self._apply(state, gradients, parameters, self._pass.accumulate_steps or 1)

    def update(self, model: Any, gradients: Any = None) -> None:
        """Apply the gradients to the parameters of the model and update the model with the new
        parameters.

        Args:
            model (mlx.nn.Module): The module whose parameters are updated.
            gradients (dict, optional): A Python tree of gradients. Without it the step takes the
              average of what :meth:`accumulate` has added since the last one, for all trainable
              parameters of the model; none was added: it does nothing.

        Raises:
            ValueError, TypeError: as of :meth:`apply_gradients`; or there is nothing that
              :meth:`accumulate` could have added to.

        Source: ``mlx.optimizers.Optimizer.update``.
        """
        if gradients is None:
            state = self._with_sums(self._usable_state())
            gradients = with_state(model.trainable_parameters())
            model.update(self._apply(state, gradients, model, accumulate_steps=1))
        else:
            model.update(self.apply_gradients(gradients, model))

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Initialize the state of one parameter; for subclasses that extend it."""
        check_array("init_single: parameter", parameter)
        self._precision.check_plain(f"{type(self).__name__}: init_single")
        self._check_without(f"{type(self).__name__}: init_single")
        for slot in self.slots:
            state[slot] = mx.zeros(parameter.shape, self.state_dtype)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        """Update one parameter and its state; for subclasses that extend it.

        As in MLX, ``self.step`` counts this step already.
        """
        self._precision.check_plain(f"{type(self).__name__}: apply_single")
        self._check_without(f"{type(self).__name__}: apply_single")
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
            self._pass.settings(self._precision.rounding, self._precision.seed, 0),
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
        form = self._form
        if isinstance(adopted, State) and adopted.has_sums() and "accumulated" not in adopted:
            raise ValueError(
                "state has sums of gradients, gradient_sum, but not how many there are, accumulated"
            )
        if isinstance(adopted, State) and "accumulated" in adopted:
            if not adopted.has_sums():
                adopted = State({k: v for k, v in dict.items(adopted) if k != "accumulated"})
            elif not form.gradient_sum and (_ext.is_tracing() or adopted["accumulated"].item()):
                form = form._replace(gradient_sum="float32")
        self._state = adopted.in_form(form) if layout else adopted
        self._initialized = layout is not None
        if form.gradient_sum:
            self._keep_sums()

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
