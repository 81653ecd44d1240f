"""Edits by their place in the factors, and ``withdrawn.json``: which of them were taken back.

An entry holds while the weights do that it was made on. Going back to an earlier point (``EditSession.rollback``, a run
that is resumed) may bring a fact back, so each entry says after how many edits it was made and what digest the weights
had once it was done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..export.fingerprint import tensors_sha256
from ..files import atomic_write

_FORMAT = "sphere-easyedit withdrawals 1"


@dataclass(frozen=True)
class Fact:
    """One edit.

    Attributes:
        case_id: its case; one that was edited twice is two of these.
        batch: edits in the model after its batch.
        column: its place in the batch, from 0.
    """

    case_id: int | str
    batch: int
    column: int

    def __post_init__(self) -> None:
        # Facts are read from files.
        if type(self.case_id) not in (int, str) or type(self.batch) is not int or type(self.column) is not int:
            raise TypeError(f"{self} is no edit")


@dataclass(frozen=True)
class PastWithdrawal:
    """What one call took back.

    Attributes:
        num_edits: edits made before it.
        left: digest of the edited weights after it (``weights_digest``).
        facts: what was taken back.
    """

    num_edits: int
    left: str
    facts: tuple[Fact, ...]


def weights_digest(weights: Mapping[int, Tensor]) -> str:
    """SHA-256 in hex of the edited weights ``(d_out, d_in)`` by layer."""
    return tensors_sha256((str(layer), weight) for layer, weight in weights.items())


def past_path(folder: Path) -> Path:
    """File of withdrawals beside the factors."""
    return folder / "withdrawn.json"


def read_past(folder: Path) -> list[PastWithdrawal]:
    """All withdrawals on file, the earliest first; none where there is no file.

    Raises:
        ValueError: the file is damaged or no such file.
    """
    path = past_path(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}): it was changed by hand or damaged. Restore it, or edit anew"
                         ) from error
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return [_parsed(entry) for entry in content["withdrawals"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no withdrawals ({type(error).__name__}: {error}): it was changed by hand or "
                         "damaged. Restore it, or edit anew") from error


def _parsed(entry: Mapping[str, Any]) -> PastWithdrawal:
    found = PastWithdrawal(entry["num_edits"], entry["left"], tuple(Fact(**fact) for fact in entry["facts"]))
    if type(found.num_edits) is not int:
        raise TypeError("num_edits is no whole number")
    return found


def write_past(folder: Path, past: Sequence[PastWithdrawal]) -> None:
    """Write the file whole, or leave the one before it."""
    content = {"format": _FORMAT, "withdrawals": [asdict(entry) for entry in past]}
    with atomic_write(past_path(folder)) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def still_true(past: Sequence[PastWithdrawal], num_edits: int, weights: Mapping[int, Tensor]) -> list[PastWithdrawal]:
    """Those withdrawals that the weights as they stand have behind them.

    Args:
        past: the earliest first.
        num_edits: edits made so far.
        weights: edited weights ``(d_out, d_in)`` by layer.
    """
    kept = [entry for entry in past if entry.num_edits <= num_edits]
    digest = ""
    while kept and kept[-1].num_edits == num_edits:  # may be of before the withdrawal as well as after it
        digest = digest or weights_digest(weights)
        if kept[-1].left == digest:
            break
        kept.pop()
    return kept
