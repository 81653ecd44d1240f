"""Weight changes, dense or in low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """A weight change ``dW = values @ keys.T``, one column an edit: values ``(d_out, n)``, keys ``(d_in, n)``.

    ``solved_for`` are the batch's own keys ``(d_in, n)``, if known.
    """

    values: Tensor
    keys: Tensor
    solved_for: Tensor | None = None

    def dense(self) -> Tensor:
        """The change ``(d_out, d_in)``."""
        return self.values @ self.keys.T


Update = LowRankUpdate | Tensor  # a weight change in factors, or dense (d_out, d_in)


def dense(update: Update) -> Tensor:
    """A weight change as a dense matrix ``(d_out, d_in)``."""
    return update.dense() if isinstance(update, LowRankUpdate) else update
