"""What the fused optimizers do in the pass of a step besides their rule."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn import Module

from . import _ext
from .additions import Additions, chosen
from .checks import (
    as_float_scalar,
    check_array,
    check_shape,
    check_tree,
    kind_of,
    misfit,
    with_state,
)
from .groups import Group, Groups, ParameterGroup
from .layout import Layout
from .slots import EMA, FLOATING, GRADIENT_SUM
from .state import State
from .walk import CONTAINERS, Keys, build, children, inner_like, path_of

NO_LOSS_SCALE = "loss_scale needs grad_scale=flatstep.DynamicLossScale()"


def _dtype(name: str | None) -> mx.Dtype | None:
    return getattr(mx, name) if name else None


class InPass(Additions):
    """The base of :class:`FusedOptimizer`, which has what is asked for here."""

    _usable_state: Callable[[], State]
    _lends_average = False  # a model has it for weights

    max_grad_norm = chosen("_pass", "max_grad_norm")
    clip_value = chosen("_pass", "clip_value")
    skip_nonfinite = chosen("_pass", "skip_nonfinite")
    norm_group = chosen("_pass", "norm_group")
    accumulate_steps = chosen("_pass", "accumulate_steps")
    accumulate_dtype = property(lambda self: _dtype(self._pass.accumulate_dtype))
    ema_dtype = property(lambda self: _dtype(self._pass.ema_dtype))
    ema = chosen("_pass", "ema")
    ema_start = chosen("_pass", "ema_start")
    ema_every = chosen("_pass", "ema_every")

    # ---- Gradients ----

    @property
    def grad_scale(self) -> mx.array | None:
        """What gradients are multiplied by as they are read; ``None`` where no scale was given.

        Set it to a number or a float scalar between steps; a compiled function sees it too, since
        it is in the state.
        """
        if self._pass.loss_scale is not None:
            return mx.reciprocal(self.loss_scale)
        scale: mx.array | None = self.state.get("grad_scale")
        return scale

    @grad_scale.setter
    def grad_scale(self, grad_scale: float | mx.array) -> None:
        if self._pass.loss_scale is not None:
            raise ValueError(
                "grad_scale is a DynamicLossScale, which sets it; to change its scale set "
                "optimizer.loss_scale"
            )
        self.state["grad_scale"] = as_float_scalar("grad_scale", grad_scale)

    @property
    def loss_scale(self) -> mx.array:
        """What the loss should be multiplied by: the scale of a :class:`DynamicLossScale`."""
        if self._pass.loss_scale is None:
            raise ValueError(NO_LOSS_SCALE)
        scale: mx.array = self.state["loss_scale"]
        return scale

    @loss_scale.setter
    def loss_scale(self, loss_scale: float | mx.array) -> None:
        if self._pass.loss_scale is None:
            raise ValueError(NO_LOSS_SCALE)
        self.state["loss_scale"] = loss_scale

    def accumulate(self, gradients: Any) -> None:
        """Adds gradients to their sums, in place, for a step that :meth:`update` takes without any.

        Each gradient is free once it is added. A step leaves no sum behind: what was added for
        parameters that it is not given is dropped. The sums are float32, or bfloat16 that is
        rounded by chance where the optimizer was made with ``accumulate_dtype=mx.bfloat16``;
        ``state`` shows them as ``gradient_sum`` beside each parameter's state, and how many were
        added as ``accumulated``.

        Args:
            gradients (dict): A Python tree of gradients, as of :meth:`apply_gradients`. Call
              ``init`` before the first.

        Raises:
            ValueError: a gradient has no state, or not its parameter's shape; the message names the
              path. Nothing is changed.
            TypeError: a leaf is not an array, or has a dtype that is not supported.

        Example:
            >>> import flatstep as optim, mlx.core as mx, mlx.nn as nn
            >>> model = nn.Linear(1, 1, bias=False)
            >>> model.weight = mx.zeros((1, 1))
            >>> optimizer = optim.SGD(learning_rate=1.0)
            >>> optimizer.init(model.trainable_parameters())
            >>> for g in (1.0, 2.0): optimizer.accumulate({"weight": mx.array([[g]])})
            >>> optimizer.update(model)
            >>> model.weight
            array([[-1.5]], dtype=float32)
        """
        check_tree("gradients", gradients)
        state = self._usable_state()
        added = self._added(state, gradients, {})
        assert added.layout is not None
        state.commit(added.layout, added.flat(), {"accumulated": added["accumulated"]})
        self._keep_sums()

    def _keep_sums(self) -> None:
        """From now on the state has sums of gradients, whatever was said of them."""
        if self._pass.accumulate_dtype is None:
            self._pass = self._pass._replace(accumulate_dtype="float32")

    def _added(self, state: State, gradients: Any, parameters: Any) -> State:
        """A copy of the state with gradients added to their sums."""
        state = self._with_sums(state)
        layout = state.layout
        assert layout is not None
        sums, scalars = _ext.accumulate(
            layout.engine,
            layout.skeleton,
            gradients,
            [state.flat_arrays(GRADIENT_SUM)],
            {name: state[name] for name in ("step", "accumulated")},
            self._precision.seed,
            self._leaf_groups(layout, parameters),
        )
        added = State(dict.items(state))
        added.commit(
            layout, {**state.flat(), GRADIENT_SUM: sums}, {"accumulated": scalars["accumulated"]}
        )
        return added

    def _with_sums(self, state: State) -> State:
        """The state, or a copy that has sums of gradients, of none yet."""
        layout = state.layout
        if layout is None:
            raise ValueError(
                "accumulate needs to know the parameters: call "
                "optimizer.init(model.trainable_parameters()) first"
            )
        if layout.form.gradient_sum:
            return state
        if _ext.is_tracing():
            raise ValueError(
                "accumulate in a compiled function needs sums that were there before: make the "
                "optimizer with accumulate_dtype=mx.float32"
            )
        state = state.with_sums(self._pass.accumulate_dtype or "float32")
        state["accumulated"] = 0
        return state

    # ---- The average of the weights ----

    def ema_weights(self, parameters: Any) -> Any:
        """The average of the weights that ``ema=`` keeps.

        Args:
            parameters (dict): A Python tree of parameters, or an ``mlx.nn.Module``.

        Returns:
            A tree of the same structure. Where the optimizer has an average of a parameter, that,
            in the parameter's dtype; otherwise the parameter.

        Raises:
            ValueError: the optimizer was made without ``ema`` or has no average of any of the
              parameters, or one has not the shape that the state has for it.

        Example:
            >>> import flatstep as optim, mlx.core as mx
            >>> optimizer = optim.SGD(learning_rate=1.0, ema=0.5)
            >>> w = {"w": mx.zeros(1)}
            >>> optimizer.init(w)
            >>> w = optimizer.apply_gradients({"w": mx.ones(1)}, w)
            >>> w["w"], optimizer.ema_weights(w)["w"]
            (array([-1], dtype=float32), array([-0.5], dtype=float32))
        """
        if self._pass.ema is None:
            raise ValueError("ema_weights needs an optimizer that was made with ema=")
        check_tree("parameters", parameters)
        tree = parameters.parameters() if isinstance(parameters, Module) else parameters
        state = self._laid_out(with_state(tree))
        layout = state.layout if isinstance(state, State) else None
        numbers = {leaf.keys: i for i, leaf in enumerate(layout.leaves)} if layout else {}

        found: list[int] = []

        def expand(keys: Keys, node: Any) -> Any:
            if isinstance(node, CONTAINERS):
                return inner_like(node, children(node))
            check_array(f"{path_of(keys)}: a parameter", node)
            number = numbers.get(keys)
            if number is None or layout is None or node.dtype not in FLOATING:
                return node
            found.append(number)
            check_shape(layout.leaves[number], node)
            return layout.leaf_floats(EMA, state.flat_arrays(EMA), number).astype(node.dtype)

        averages = build(expand, tree)
        if not found:
            raise ValueError(
                "ema_weights: the optimizer has no average of any of these parameters; call "
                "optimizer.init(model.trainable_parameters()) first"
            )
        return averages

    @contextmanager
    def use_ema_weights(self, model: Module) -> Iterator[Module]:
        """Within ``with``, a model has the average of its weights; then its own again.

        Raises:
            ValueError: as :meth:`ema_weights`; and of a step inside, which would be lost.

        Example:
            >>> import flatstep as optim, mlx.core as mx, mlx.nn as nn
            >>> model = nn.Linear(2, 2)
            >>> optimizer = optim.Adam(1e-3, ema=0.999)
            >>> optimizer.init(model.trainable_parameters())
            >>> with optimizer.use_ema_weights(model):
            ...     y = model(mx.ones(2))
        """
        if not isinstance(model, Module):
            raise TypeError(misfit("model", "an mlx.nn.Module", kind_of(model)))
        averages = self.ema_weights(model)
        own = model.parameters()
        model.update(averages)
        self._lends_average = True
        try:
            yield model
        finally:
            self._lends_average = False
            model.update(own)

    # ---- Groups of parameters ----

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The groups of parameters in their order, then all that are in none.

        Assign a list of :class:`Group` to change them between steps; the state stays. A function
        that is compiled already keeps the groups that it was traced with.
        """
        groups: list[Group | None] = [*self._groups.groups, None]
        paths: list[list[str]] = [[] for _ in groups]
        layout = self._layout
        if layout is not None:
            numbers = self._groups.numbers(layout, {})
            for leaf, number in zip(layout.leaves, numbers, strict=True):
                paths[number].append(leaf.path)
        pairs = zip(groups, paths, strict=True)
        return tuple(ParameterGroup(self, i, group, its) for i, (group, its) in enumerate(pairs))

    @groups.setter
    def groups(self, groups: Sequence[Group]) -> None:
        new = Groups(groups)
        old, self._groups = self._groups, new
        try:
            self.rule()
            rates = new.initial_rates(self.learning_rate) if new else None
        except Exception:
            self._groups = old
            raise
        if rates is not None:
            self.state["group_learning_rates"] = rates
        elif "group_learning_rates" in self.state:
            del self.state["group_learning_rates"]

    def _leaf_groups(self, layout: Layout, parameters: Any) -> _ext.LeafGroups | None:
        return self._groups.of_leaves(layout, parameters)[2] if self._groups else None
