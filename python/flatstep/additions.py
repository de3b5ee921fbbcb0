"""What the fused optimizers have besides the interface of ``mlx.optimizers``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from . import _ext
from .checks import (
    as_learning_rate,
    as_step,
    check_flat_arrays,
    check_tree,
    kind_of,
    misfit,
    with_state,
)
from .groups import Groups
from .layout import Layout, Segment, single_step
from .master_weights import joined, keep, split
from .precision import Precision
from .slots import StateForm
from .state import State
from .step_options import Pass
from .walk import Keys, build, children, inner_like, plain


class FlatUpdate(NamedTuple):
    """What ``flat_update`` returns: arrays for the next call."""

    parameter: mx.array
    state: tuple[mx.array, ...]
    step: mx.array
    learning_rate: mx.array


def chosen(options: str, name: str) -> property:
    """What was chosen when the optimizer was made, and can't be assigned."""
    return property(lambda self: getattr(getattr(self, options), name))


class Additions(Optimizer):
    """The base of :class:`FusedOptimizer`, which has what is asked for here."""

    slots: tuple[str, ...]
    _state: Any
    rule: Callable[[], _ext.Rule]
    _precision: Precision
    _pass: Pass
    _leaf_groups: Callable[[Layout, Any], _ext.LeafGroups | None]
    _groups: Groups
    _plain_schedule: Callable[[], _ext.PlainSchedule | None]

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
        return layout is not None and _ext.are_flat(
            layout.engine, layout.skeleton, tree, self._leaf_groups(layout, tree)
        )

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
        self._check_without(
            "flat_update",
            *("max_grad_norm", "loss_scale", "skip_nonfinite", "accumulate_dtype", "ema"),
        )
        if self._precision.master_weight_bits:
            raise ValueError(
                "flat_update: master_weight_bits keeps what it needs in the optimizer's own state; "
                "make this one without, and pass float32 parameters"
            )
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
            parameter,
            gradient,
            rule,
            plain,
            state,
            count,
            rate,
            self._pass.settings(self._precision.rounding, self._precision.seed, 0),
        )
        return FlatUpdate(updated, values, next_step, scheduled)

    @property
    def state_dtype(self) -> mx.Dtype:
        """How the state is stored; chosen when the optimizer is made."""
        dtype: mx.Dtype = getattr(mx, self._precision.state_dtype)
        return dtype

    def _check_without(self, where: str, *names: str) -> None:
        """Raises ValueError where these options of a step, or all if none are named, have no place,
        nor groups, nor a scale of the gradients."""
        self._pass.check_without(where, *names)
        has_scale = isinstance(self._state, dict) and "grad_scale" in self._state
        for name, is_there in (("groups", bool(self._groups)), ("grad_scale", has_scale)):
            if is_there:
                raise ValueError(f"{where} has no place for {name}; make the optimizer without it")

    @property
    def _form(self) -> StateForm:
        """How the state is kept."""
        rule = self.rule()
        unsigned = tuple(slot for k, slot in enumerate(self.slots) if not rule.has_sign(k))
        precision = self._precision
        return StateForm(
            self.slots,
            unsigned,
            precision.state_dtype,
            precision.master_weight_bits,
            precision.full_precision,
            self._pass.ema_dtype,
            self._pass.accumulate_dtype,
        )

    def _laid_out(self, parameters: Any) -> Any:
        """The state, or a copy in flat arrays where it was set and no step has laid it out yet."""
        state = self._state
        if not isinstance(state, State) or state.layout is not None:
            return state
        copy = State(dict.items(state))
        copy.commit(*state.make_flat(parameters, self._form), {})
        return copy

    master_weight_bits = chosen("_precision", "master_weight_bits")
    stochastic_rounding = chosen("_precision", "stochastic_rounding")
    full_precision = chosen("_precision", "full_precision")
    seed = chosen("_precision", "seed")

    @property
    def _layout(self) -> Layout | None:
        return self._state.layout if isinstance(self._state, State) else None

    # ---- Master weights, and state as floats ----

    def master_weights(self, parameters: Any) -> Any:
        """The weights as the optimizer knows them, in float32.

        With ``master_weight_bits`` a float16 or bfloat16 parameter and what is kept beside it are
        one weight of 24 or 32 bits. Where a parameter was replaced since the last step, what was
        kept is not its own and counts as zero, block of 64 by block.

        Args:
            parameters (dict): A Python tree of parameters, or an ``mlx.nn.Module``.

        Returns:
            A tree of the same structure; float arrays as float32, others as they are.

        Raises:
            TypeError: the tree is no dict, or a leaf no array.
            ValueError: a parameter has not the shape that the state has for it, or the state is for
              none of them; the message names the path.

        Example:
            >>> import flatstep as optim, mlx.core as mx
            >>> optimizer = optim.SGD(learning_rate=1e-4, master_weight_bits=24)
            >>> w = {"w": mx.ones(64, mx.bfloat16)}
            >>> w = optimizer.apply_gradients({"w": mx.ones(64)}, w)
            >>> w["w"][0], optimizer.master_weights(w)["w"][0]
            (array(1, dtype=bfloat16), array(0.999893, dtype=float32))
        """
        check_tree("parameters", parameters)
        tree = parameters.parameters() if isinstance(parameters, Module) else parameters
        return joined(self._laid_out(with_state(tree)), tree)

    def set_master_weights(self, model: Module, weights: Any) -> None:
        """Sets a model's parameters, and what is kept beside them, from float32 weights.

        Both parts together are the weights rounded to ``master_weight_bits``: how a float32
        checkpoint is loaded into a model in bfloat16. What the optimizer keeps nothing for, such as
        a frozen layer, is rounded to its dtype.

        Args:
            model (mlx.nn.Module): Its parameters keep their dtypes. State is made for them, by
              ``init``, if there is none yet.
            weights (dict): A Python tree of arrays, of the model's parameters or a part of them.

        Raises:
            TypeError: a weight is not an array of floats.
            ValueError: a weight has no parameter, or not its shape; the message names the path.
              Nothing is changed.

        Example:
            >>> import flatstep as optim, mlx.core as mx, mlx.nn as nn
            >>> model = nn.Linear(64, 64, bias=False)
            >>> model.set_dtype(mx.bfloat16)
            >>> optimizer = optim.AdamW(learning_rate=1e-4, master_weight_bits=24)
            >>> optimizer.set_master_weights(model, {"weight": mx.full((64, 64), 0.1)})
            >>> optimizer.master_weights(model)["weight"][0, 0]
            array(0.100001, dtype=float32)
        """
        if not isinstance(model, Module):
            raise TypeError(misfit("model", "an mlx.nn.Module", kind_of(model)))
        check_tree("weights", weights)
        if not self._initialized:
            self.init(model.trainable_parameters())
        layout = self._layout
        assert layout is not None
        parameters, rests = split(layout, model.parameters(), weights)
        model.update(parameters)
        keep(self._state, layout, rests)

    def dequantized_state(self) -> Any:
        """The state as a plain tree of float arrays: what an optimizer with float32 state has.

        8-bit state is as its codes say, in float32; what is kept beside parameters is left out,
        since :meth:`master_weights` gives it. It can be set on this optimizer, on one without
        8-bit state, and on its namesake in ``mlx.optimizers``.

        Example:
            >>> import flatstep as optim, mlx.core as mx
            >>> optimizer = optim.Lion8bit(learning_rate=1e-4)
            >>> optimizer.init({"w": mx.zeros((64, 64))})
            >>> {name: list(leaf) for name, leaf in optimizer.state["w"].items()}
            {'m': ['codes', 'scales']}
            >>> optimizer.dequantized_state()["w"]["m"].dtype
            mlx.core.float32
        """
        state = self._laid_out({})
        layout = state.layout if isinstance(state, State) else None
        if layout is None:
            return plain(state)

        def expand(_: Keys, place: Any) -> Any:
            if not isinstance(place, int):
                return inner_like(place, children(place))
            return {
                slot: layout.leaf_floats(slot, state.flat_arrays(slot), place)
                for slot in self.slots
            }

        # Sums are left out, and so is their count.
        names = [key for key in state if key not in layout.skeleton and key != "accumulated"]
        others = {key: state[key] for key in names}
        return {**plain(others), **build(expand, layout.skeleton)}
