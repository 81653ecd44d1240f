"""Registry of base methods by name: ``base_alg`` of the hyperparameters is looked up here.

``register_method`` adds a method from outside the package; built-in ones are listed in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import isabstract

from ..utils.messages import nearest
from .alphaedit import AlphaEdit
from .base import Method
from .memit import MEMIT
from .prune import PRUNE
from .rect import RECT
from .replay_ft import ReplayFT


class MethodRegistry:
    """Methods by unique name.

    Args:
        methods: the built-in methods, which can't be removed.
    """

    def __init__(self, methods: Iterable[type[Method]]) -> None:
        self._methods = {method.name: method() for method in methods}
        self._built_in = frozenset(self._methods)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of registration."""
        return tuple(self._methods)

    @property
    def offered_to_easyedit(self) -> tuple[str, ...]:
        """Names of the methods that ``register`` adds to EasyEdit."""
        return tuple(name for name, method in self._methods.items() if method.offered_to_easyedit)

    def add(self, method: type[Method]) -> type[Method]:
        """Register a method class, which ``base_alg`` then selects by its ``name``; also usable as a class decorator.

        Args:
            method: a subclass of ``sphere_easyedit.methods.base.Method``, usually of MEMIT or AlphaEdit; that module's
                docstring shows how to write one.

        Raises:
            TypeError: it is not a subclass of ``Method``, or lacks a method.
            ValueError: it has no name, or the name is taken.
        """
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise TypeError(f"{method!r} is not a base method: give a subclass of sphere_easyedit.methods.base.Method")
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
        """Remove a method that was added.

        Raises:
            ValueError: it is unknown or built in.
        """
        self.get(name)
        if name in self._built_in:
            raise ValueError(f"{name} is built in: only methods that were added can be removed")
        del self._methods[name]

    def find(self, name: str) -> Method | None:
        """The method of a name; None if it is unknown, like methods that only EasyEdit has."""
        return self._methods.get(name)

    def get(self, name: str) -> Method:
        """The method of a name.

        Raises:
            ValueError: it is unknown; the message lists all names and the nearest.
        """
        method = self.find(name)
        if method is None:
            near = nearest(name, self.names)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} is not a base method; there are {', '.join(self.names)}{hint}")
        return method


METHODS = MethodRegistry([AlphaEdit, MEMIT, RECT, PRUNE, ReplayFT])
register_method = METHODS.add
unregister_method = METHODS.remove
