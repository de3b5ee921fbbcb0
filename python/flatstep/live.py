"""Dicts and lists whose items are what their methods say, whatever their storage holds."""

from collections.abc import (
    ItemsView,
    Iterator,
    KeysView,
    MutableMapping,
    MutableSequence,
    ValuesView,
)
from typing import TYPE_CHECKING, Any

from .walk import plain, trees_equal

if TYPE_CHECKING:
    # To a type checker a dict is a MutableMapping already, and can't come after it.
    MixinDict = dict[Any, Any]
    MixinList = list[Any]
else:

    class MixinDict(MutableMapping, dict):
        """A dict whose methods ask the few that a subclass defines."""

    class MixinList(MutableSequence, list):
        """A list likewise."""


class LiveMapping(MixinDict):
    """What the state and the dicts inside it share."""

    def _write(self, items: dict[Any, Any]) -> None:
        """Assigns all of the items, or raises and assigns none."""
        raise NotImplementedError

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write({key: value})

    def update(self, *others: Any, **items: Any) -> None:
        self._write(dict(*others, **items))

    def keys(self) -> Any:
        return _Keys(self)

    def items(self) -> Any:
        return _Items(self)

    def values(self) -> Any:
        return _Values(self)

    def popitem(self) -> tuple[Any, Any]:
        for key in reversed(self):
            return key, self.pop(key)
        raise KeyError("popitem(): dictionary is empty")

    def copy(self) -> dict[Any, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[Any]:
        return iter(list(self)[::-1])

    def __eq__(self, other: object) -> bool:
        return trees_equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(plain(self))


def _view(name: str, kind: Any) -> Any:
    """A dict's view, as a dict shows it."""
    methods = {
        "__repr__": lambda view: f"{name}({list(view)})",
        "__reversed__": lambda view: iter(list(view)[::-1]),
    }
    return type(name, (kind,), methods)


_Keys, _Items = _view("dict_keys", KeysView), _view("dict_items", ItemsView)
_Values = _view("dict_values", ValuesView)
