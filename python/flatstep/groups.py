"""Groups of parameters: which of them have other hyperparameters than the optimizer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from . import _ext
from .checks import as_finite, as_learning_rate, misfit
from .schedulers import plain_schedule
from .walk import CONTAINERS, Keys, children

if TYPE_CHECKING:
    from .layout import Layout

Match = str | Sequence[str] | Callable[[str, mx.array], bool]


class Group:
    """Parameters, and what is other for them than for the rest.

    Passed in ``groups=[...]`` to an optimizer. What a group does not name it takes from the
    optimizer. A parameter is in the first group that matches it.

    Args:
        match (callable or str or list): ``(path, parameter) -> bool``, as the filters of
          ``mlx.optimizers.MultiOptimizer``, or a glob, or some, for the path: ``"*.bias"``.
        learning_rate (float or callable, optional): A learning rate or schedule of its own.
        lr_scale (float, optional): What the optimizer's learning rate, or the group's own, is
          multiplied by. Default: ``1``
        frozen (bool, optional): A step leaves these parameters and their state as they are, and
          their gradients are not read. Default: ``False``
        **hyperparameters: Of the optimizer, as ``weight_decay`` or ``betas``.

    Raises:
        TypeError: ``match`` is none of these.
        ValueError: an argument is out of its range.

    Source: torch's parameter groups; ``mlx.optimizers.MultiOptimizer``.

    Example:
        >>> import flatstep as optim, mlx.nn as nn
        >>> optimizer = optim.AdamW(
        ...     1e-3, groups=[optim.Group("layers.0.*", lr_scale=0.1), optim.no_decay]
        ... )
        >>> optimizer.init(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).trainable_parameters())
        >>> [group.paths for group in optimizer.groups]
        [['layers.0.weight', 'layers.0.bias'], ['layers.1.bias'], ['layers.1.weight']]
    """

    def __init__(
        self,
        match: Match,
        *,
        learning_rate: float | Callable[[mx.array], mx.array] | None = None,
        lr_scale: float = 1.0,
        frozen: bool = False,
        **hyperparameters: Any,
    ):
        globs = [match] if isinstance(match, str) else match
        is_globs = isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs)
        if not callable(match) and not is_globs:
            wanted = "a glob, a list of globs, or a function of path and parameter"
            raise TypeError(misfit("match", wanted, repr(match)))
        if not isinstance(frozen, bool):
            raise TypeError(misfit("frozen", "True or False", repr(frozen)))
        if learning_rate is not None and not callable(learning_rate):
            learning_rate = as_finite("learning_rate", learning_rate)
        vars(self).update(
            match=match,
            learning_rate=learning_rate,
            lr_scale=as_finite("lr_scale", lr_scale, 0),
            frozen=frozen,
            hyperparameters=hyperparameters,
        )

    match: Match
    learning_rate: float | Callable[[mx.array], mx.array] | None
    lr_scale: float
    frozen: bool
    hyperparameters: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"a Group stays as it was made, {name} can't be set; make another and assign "
            "optimizer.groups = [...]"
        )

    def matches(self, path: str, parameter: mx.array) -> bool:
        if callable(self.match):
            return bool(self.match(path, parameter))
        globs = [self.match] if isinstance(self.match, str) else self.match
        return any(fnmatchcase(path, glob) for glob in globs)

    def __repr__(self) -> str:
        given: dict[str, Any] = {"match": getattr(self.match, "__name__", self.match)}
        if self.learning_rate is not None:
            given["learning_rate"] = self.learning_rate
        if self.lr_scale != 1:
            given["lr_scale"] = self.lr_scale
        if self.frozen:
            given["frozen"] = True
        given |= self.hyperparameters
        return f"Group({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _is_vector(path: str, parameter: mx.array) -> bool:
    return parameter.ndim < 2


# Biases and the weights of norms, which weight decay only harms: all that is no matrix.
no_decay = Group(_is_vector, weight_decay=0.0)


class ParameterGroup:
    """A group of an optimizer: which parameters are in it, and its learning rate.

    Attributes:
        paths (list): Of its parameters, in the order of the tree; ``[]`` before ``init``.
        group (Group): As it was given; ``None`` for the parameters that are in none.
    """

    __slots__ = ("_index", "_optimizer", "group", "paths")

    def __init__(self, optimizer: Any, index: int, group: Group | None, paths: list[str]):
        self._optimizer = optimizer
        self._index = index
        self.group = group
        self.paths = paths

    @property
    def learning_rate(self) -> mx.array:
        """Of the last step, or the one set since. A float32 scalar.

        Set it between steps where the group has a ``learning_rate`` that is a number; a compiled
        function sees it too, since it is in the state.
        """
        if self.group is None:
            rate: mx.array = self._optimizer.learning_rate
            return rate
        rates: mx.array = self._optimizer.state["group_learning_rates"]
        return rates[self._index]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        if self.group is None:
            self._optimizer.learning_rate = learning_rate
            return
        rate = as_learning_rate(learning_rate)
        self._optimizer._groups.set_rate(self._index, rate, self._optimizer.state)

    def __repr__(self) -> str:
        return f"ParameterGroup({self.group!r}, {len(self.paths)} parameters)"


class Groups:
    """The groups of an optimizer, as the engine takes them."""

    def __init__(self, groups: Sequence[Group]):
        if isinstance(groups, Group) or not isinstance(groups, Sequence):
            raise TypeError(misfit("groups", "a list of flatstep.Group", repr(groups)))
        for i, group in enumerate(groups):
            if not isinstance(group, Group):
                raise TypeError(misfit(f"groups[{i}]", "a flatstep.Group", repr(group)))
        self.groups = list(groups)
        self._rule: tuple[tuple[str, dict[str, float]], _ext.Rule] | None = None
        self._leaves: tuple[str, list[int], _ext.LeafGroups] | None = None

    def __reduce__(self) -> Any:
        return Groups, (self.groups,)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def initial_rates(self, learning_rate: float | mx.array) -> mx.array:
        rates = []
        for group in self.groups:
            rate: Any = group.learning_rate
            if callable(rate):
                plain = plain_schedule(rate)
                rate = plain(0) if plain else rate(mx.array(0, mx.uint64))
            rates.append(as_learning_rate(learning_rate if rate is None else rate) * group.lr_scale)
        return mx.stack(rates)

    def set_rate(self, index: int, rate: mx.array, state: Any) -> None:
        own = self.groups[index].learning_rate
        if own is None or callable(own):
            what = "follows the optimizer's learning rate" if own is None else "has a schedule"
            raise ValueError(
                f"groups[{index}] {what}; only a Group that was given a learning_rate that is a "
                "number has one to set (optimizer.groups = [...] replaces groups)"
            )
        old = state["group_learning_rates"]
        state["group_learning_rates"] = mx.slice_update(
            old, rate.reshape(1), mx.array([index]), [0]
        )

    def scheduled_rates(self, rates: mx.array, step: mx.array) -> mx.array:
        """The rates, with those that only MLX operations can evaluate as they are at this step."""
        for i, group in enumerate(self.groups):
            schedule = group.learning_rate
            if callable(schedule) and plain_schedule(schedule) is None:
                rate = as_learning_rate(schedule(step)) * group.lr_scale
                rates = mx.slice_update(rates, rate.reshape(1), mx.array([i]), [0])
        return rates

    def rule(
        self,
        name: str,
        values: dict[str, float],
        with_others: Callable[[dict[str, Any]], tuple[str, dict[str, float]]],
    ) -> _ext.Rule:
        """An optimizer's rule with a group for each; `with_others` has other hyperparameters in
        place of some of its own."""
        if self._rule is None or self._rule[0] != (name, values):
            groups = [with_others(group.hyperparameters) for group in self.groups]
            # One with momentum, say, does what one without does where that is zero.
            names = dict.fromkeys([name, *(other for other, _ in groups)])
            largest = max(names, key=lambda n: _ext.Rule(n, values).num_states)
            rule = _ext.Rule(largest, values)
            for group, (_, of_group) in zip(self.groups, groups, strict=True):
                schedule = group.learning_rate if callable(group.learning_rate) else None
                plain = plain_schedule(schedule) if schedule else None
                source = _ext.RateSource.SCHEDULE if plain else _ext.RateSource.ALL
                if group.learning_rate is not None and plain is None:
                    source = _ext.RateSource.OWN
                rule = rule.with_group(of_group, source, group.lr_scale, plain)
            self._rule = ((name, values), rule)
        return self._rule[1]

    def of_leaves(self, layout: Layout, parameters: Any) -> tuple[str, list[int], _ext.LeafGroups]:
        """Which group each leaf of a layout is in: the layout's text, their numbers, and the same
        for the engine. What a tree of parameters has decided for a layout stays."""
        if self._leaves is None or self._leaves[0] != layout.text:
            numbers = self.numbers(layout, parameters)
            frozen = [*(group.frozen for group in self.groups), False]
            # To the engine the rest is number 0.
            numbers_there = [(i + 1) % len(frozen) for i in range(len(frozen))]
            engine = [_ext.FROZEN if frozen[i] else numbers_there[i] for i in numbers]
            found = (layout.text, numbers, _ext.LeafGroups(engine))
            if not parameters:
                return found  # to be looked at again
            self._leaves = found
        return self._leaves

    def numbers(self, layout: Layout, parameters: Any) -> list[int]:
        """Of each leaf the first group that matches; how many there are for none. Weights that
        are not known, nor in `parameters`, are zeros."""
        if self._leaves is not None and self._leaves[0] == layout.text:
            return self._leaves[1]
        weights: dict[Keys, mx.array] = {}
        todo: list[tuple[Keys, Any]] = [((), parameters)]
        for keys, node in todo:
            if isinstance(node, CONTAINERS):
                todo += [((*keys, key), child) for key, child in children(node)]
            else:
                weights[keys] = node
        numbers = []
        for leaf in layout.leaves:
            weight = weights.get(leaf.keys)
            if weight is None:
                weight = mx.broadcast_to(mx.array(0, leaf.dtype), leaf.shape)
            matching = (i for i, g in enumerate(self.groups) if g.matches(leaf.path, weight))
            numbers.append(next(matching, len(self.groups)))
        return numbers
