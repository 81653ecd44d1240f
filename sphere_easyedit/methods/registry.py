"""Base methods by name."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import isabstract

from ..utils.messages import nearest
from .alphaedit import AlphaEdit
from .base import Method
from .memit import MEMIT
from .prune import PRUNE
from .rect import RECT


class MethodRegistry:
    """Methods by name; names are unique.

    Args:
        methods: registered from the start; these can't be removed.
    """

    def __init__(self, methods: Iterable[type[Method]]) -> None:
        self._methods = {method.name: method() for method in methods}
        self._built_in = frozenset(self._methods)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of registration."""
        return tuple(self._methods)

    @property
    def offered_to_easyedit(self) -> tuple[str, ...]:
        """Names of those that EasyEdit lacks and is given by ``register``."""
        return tuple(name for name, method in self._methods.items() if method.offered_to_easyedit)

    def add(self, method: type[Method]) -> type[Method]:
        """Register a method; returns the class, so that it serves as a decorator.

        Raises:
            TypeError: it is no subclass of ``Method``, or a part of it is missing.
            ValueError: it has no name, or its name is taken.
        """
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise TypeError(f"{method!r} is no base method: give a subclass of sphere_easyedit.methods.base.Method")
        if isabstract(method):
            missing = ", ".join(sorted(method.__abstractmethods__))
            raise TypeError(f"{method.__name__} lacks {missing}: define them, or derive it from MEMIT or AlphaEdit")
        name = getattr(method, "name", None)
        if not isinstance(name, str) or not name or name == "SPHERE":
            raise ValueError(f"{method.__name__}.name is {name!r}: give the text that base_alg selects it by, other "
                             "than SPHERE")
        if name in self._methods:
            raise ValueError(f"a method {name!r} is registered already ({type(self._methods[name]).__qualname__}): "
                             "give this one another name")
        self._methods[name] = method()
        return method

    def remove(self, name: str) -> None:
        """Forget a method that was added.

        Raises:
            ValueError: there is none, or it is built in.
        """
        self.get(name)
        if name in self._built_in:
            raise ValueError(f"{name} is built in: only methods that were added can be removed")
        del self._methods[name]

    def find(self, name: str) -> Method | None:
        """The method of a name, None if there is none (as for methods that EasyEdit alone has)."""
        return self._methods.get(name)

    def get(self, name: str) -> Method:
        """The method of a name.

        Raises:
            ValueError: there is none; the message names the nearest, and all.
        """
        method = self.find(name)
        if method is None:
            near = nearest(name, self.names)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} is no base method; there are {', '.join(self.names)}{hint}")
        return method


METHODS = MethodRegistry([AlphaEdit, MEMIT, RECT, PRUNE])


def register_method(method: type[Method]) -> type[Method]:
    """Make a base method of one's own known by its name: ``base_alg`` of hyperparameters then selects it.

    Raises:
        TypeError, ValueError: see ``MethodRegistry.add``.
    """
    return METHODS.add(method)


def unregister_method(name: str) -> None:
    """Undo ``register_method``.

    Raises:
        ValueError: there is no such method, or it is built in.
    """
    METHODS.remove(name)


def get_method(name: str) -> Method:
    """A registered base method.

    Raises:
        ValueError: there is none of this name.
    """
    return METHODS.get(name)
