"""Locks a model or module, so that one thread at a time uses it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ATTRIBUTE = "_sphere_lock"


class _Lock:
    """A re-entrant lock; copying or pickling it (with its model) gives a new, free lock."""

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


@contextmanager
def exclusive(holder: Any) -> Iterator[None]:
    """Hold an object's lock inside the context; other threads that use ``exclusive`` on it wait.

    A thread may enter several times. Code that locks several objects locks the model first, to avoid deadlocks.

    Args:
        holder: a model, or a Python module; the lock is an attribute of it.
    """
    lock: _Lock = vars(holder).setdefault(_ATTRIBUTE, _Lock())  # setdefault is atomic
    with lock.held:
        yield
