"""The hyperparameter classes of EasyEdit's methods."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

logger = logging.getLogger(__name__)

# Fields of ULTRAEDIT's class alone: the number of requests per forward pass, and of rows normalised at once.
CHUNK_FIELDS: Final = ("batch_size_once", "editor_batch_size")


def hparams_class(function: Callable[..., Any]) -> type | None:
    """The hyperparameter class of an executor that can be wrapped, by its signature; None for any other."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    parameter = signature.parameters.get("hparams")
    annotation = None if parameter is None else parameter.annotation
    if isinstance(annotation, str):
        annotation = getattr(sys.modules.get(function.__module__), annotation, None)
    if not (isinstance(annotation, type) and dataclasses.is_dataclass(annotation)):
        return None
    names = {field.name for field in dataclasses.fields(annotation)}
    fits = any(needed <= names for needed in ({"layers", "rewrite_module_tmp"}, {"inner_params", *CHUNK_FIELDS},
                                              {"base_method"}))
    return annotation if fits and "return_orig_weights" in signature.parameters else None


def runs_another(function: Callable[..., Any]) -> bool:
    """Whether an executor runs another method of EasyEdit's, named by its hyperparameters (SimIE)."""
    method_class = hparams_class(function)
    return method_class is not None and "base_method" in {field.name for field in dataclasses.fields(method_class)}


def chunk_size(values: Mapping[str, Any], batch_size: int) -> int:
    """The largest number up to ``batch_size_once`` that divides the batch, since EasyEdit drops any remainder."""
    for name in CHUNK_FIELDS:
        if not isinstance(values[name], int) or values[name] < 1:
            raise ValueError(f"{name} is {values[name]!r}: give a whole number from 1 up")
    largest = min(values["batch_size_once"], batch_size)
    size = next(size for size in range(largest, 0, -1) if batch_size % size == 0)
    if size != largest:
        logger.info("batch_size_once is %d, which does not divide a batch of %d requests: using %d",
                    values["batch_size_once"], batch_size, size)
    return size
