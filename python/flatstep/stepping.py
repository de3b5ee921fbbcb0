"""A step of a fused optimizer: from trees, options and the state to the engine and back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from . import _ext
from .checks import SCALARS, as_learning_rate, as_step, check_state
from .in_pass import InPass
from .layout import Layout
from .schedulers import plain_schedule
from .state import State
from .step_options import defaults_of
from .trees import matching_part


@lru_cache
def make_rule(name: str, **values: float) -> _ext.Rule:
    """A rule of the engine's table; a training loop asks for the same at every step."""
    return _ext.Rule(name, values)


class Stepping(InPass):
    """The base of :class:`FusedOptimizer`, whose interface asks for what is here."""

    def hyperparameters(self) -> tuple[str, dict[str, float]]:
        """The name of the engine's rule, and its hyperparameters as they are now.

        Raises:
            ValueError: a hyperparameter is out of its range.
        """
        raise NotImplementedError

    def rule(self) -> _ext.Rule:
        """The engine's form of the hyperparameters as they are now, those of all groups.

        Raises:
            ValueError: a hyperparameter is out of its range, or a group has one that this optimizer
              has not.
        """
        name, values = self.hyperparameters()
        if not self._groups:
            return make_rule(name, **values)
        return self._groups.rule(name, values, self._with_others)

    def _with_others(self, others: dict[str, Any]) -> tuple[str, dict[str, float]]:
        """The rule and hyperparameters with others in place of some of this optimizer's."""
        own = [key for key in vars(self) if not key.startswith("_")]
        for key in others:
            if key not in own:
                raise ValueError(
                    f"groups: {key} is none of {type(self).__name__}'s hyperparameters, which are "
                    f"{', '.join(own)}"
                )
        copy = object.__new__(type(self))
        vars(copy).update({**vars(self), **others})
        return copy.hyperparameters()

    def _apply(self, state: State, gradients: Any, parameters: Any, accumulate_steps: int) -> Any:
        if self._lends_average:
            raise ValueError(
                "a step inside use_ema_weights would be lost: the model gets back the weights that "
                "it had before"
            )
        scheduled = self._scheduled_values()
        layout = state.layout
        result = None
        if layout is not None:
            result = self._step(state, layout, gradients, parameters, scheduled, accumulate_steps)
        if layout is None or result is None:
            # The first step, or parameters were cast since `init`: lay them out as they are.
            part = matching_part(gradients, parameters)
            layout, flat = state.make_flat(part, self._form)
            state = State(dict.items(state))
            state.commit(layout, flat, {})
            result = self._step(state, layout, gradients, parameters, scheduled, accumulate_steps)
            assert result is not None
        updated, written, scalars = result
        self._state.commit(layout, written, scalars)
        self._initialized = True
        return updated

    def _step(
        self,
        state: State,
        layout: Layout,
        gradients: Any,
        parameters: Any,
        scheduled: dict[str, mx.array],
        accumulate_steps: int,
    ) -> tuple[Any, dict[str, list[mx.array]], dict[str, mx.array]] | None:
        """A step from a state: the parameters, and all flat arrays and scalars of the next."""
        rule, options = self.rule(), self._pass
        form = layout.form
        flat = state.flat()
        slots = [slot for slot in flat if slot not in self.slots[rule.num_states :]]
        scalars = {name: value for name, value in dict.items(state) if name in SCALARS}
        scalars["step"] = as_step(scalars["step"])
        old_rate = scalars["learning_rate"] = as_learning_rate(scalars["learning_rate"])
        plain = self._plain_schedule()
        if plain is not None and not (options.skip_nonfinite or form.gradient_sum):
            del scalars["learning_rate"]  # the kernel gives it
        elif "learning_rate" in scheduled:
            scalars["learning_rate"] = scheduled["learning_rate"]
        if options.loss_scale is not None:
            scalars["grad_scale"] = mx.reciprocal(scalars["loss_scale"])
        if self._groups:
            old_rates = scalars["group_learning_rates"]
            rates = self._groups.scheduled_rates(old_rates, scalars["step"])
            scalars["group_learning_rates"] = rates
        else:
            scalars.pop("group_learning_rates", None)  # of groups that were there before
        result = _ext.step(
            layout.engine,
            layout.skeleton,
            gradients,
            parameters,
            rule,
            plain,
            [flat[slot] for slot in slots],
            scalars,
            options.settings(
                self._precision.rounding,
                self._precision.seed,
                accumulate_steps if form.gradient_sum else 0,
            ),
            self._leaf_groups(layout, parameters),
            options.norm_group,
        )
        if result is None:
            return None
        updated, arrays, after = result
        flat.update(zip(slots, arrays, strict=True))
        if options.loss_scale is not None:
            del after["grad_scale"]
        others = {name: value for name, value in scheduled.items() if name != "learning_rate"}
        if options.skip_nonfinite or form.gradient_sum:
            taken = after["step"] != scalars["step"]
            if "learning_rate" in scheduled:
                after["learning_rate"] = mx.where(taken, scheduled["learning_rate"], old_rate)
            if self._groups and rates is not old_rates:
                new_rates = after["group_learning_rates"]
                after["group_learning_rates"] = mx.where(taken, new_rates, old_rates)
            if options.loss_scale is not None:
                skipped = after["skipped_steps"] != scalars["skipped_steps"]
                held = (scalars["loss_scale"], scalars["loss_scale_steps"])
                after |= options.loss_scale.advanced(*held, taken, skipped)
        return updated, flat, {**others, **after}

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
        for name, default in defaults_of(self._pass).items():
            if dict.get(state, name) is None:
                dict.__setitem__(state, name, default())
        if self._groups:
            rates = dict.get(state, "group_learning_rates")
            if rates is None or rates.size != len(self._groups.groups):
                rates = self._groups.initial_rates(state["learning_rate"])
                dict.__setitem__(state, "group_learning_rates", rates)
        return state
