"""Locks on objects that threads share: one thread at a time uses a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ATTRIBUTE = "_sphere_lock"


class _Lock:
    """A re-entrant lock. A copy of it, as in a copied or pickled model, is a new lock that nobody holds."""

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


@contextmanager
def exclusive(holder: Any) -> Iterator[None]:
    """Keep other threads out of everything that runs under ``exclusive`` with the same object; they wait.

    A thread may enter several times. Code that locks several objects locks the model first, so that no two threads
    wait for each other.

    Args:
        holder: a model, or a Python module; the lock is kept as an attribute of it.
    """
    lock: _Lock = vars(holder).setdefault(_ATTRIBUTE, _Lock())  # setdefault is atomic: all threads get the same one
    with lock.held:
        yield
