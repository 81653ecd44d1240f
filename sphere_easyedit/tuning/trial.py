"""One trial: edits facts batch after batch into the model, scores it, and puts its weights back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord
from ..editing.pipeline import apply_sphere_to_model
from ..editing.session import EditSession
from ..evaluation.metrics import evaluate_records, summarise
from ..evaluation.perplexity import perplexity
from ..hparams import SPHEREHyperParams

NEIGHBOURS = 3  # neighbourhood prompts of a fact that a trial measures; the validation measures all
_BROKEN = 1e6


@dataclass(frozen=True)
class Scores:
    """Metrics by protocol ``paper`` in percent (None without prompts), and perplexity on held-out text."""

    efficacy: float | None
    generalization: float | None
    specificity: float | None
    perplexity: float

    @property
    def score(self) -> float:
        """Mean of efficacy and generalization; efficacy alone if no fact has a paraphrase."""
        found = [value for value in (self.efficacy, self.generalization) if value is not None]
        return sum(found) / len(found)

    def to_dict(self) -> dict[str, float | None]:
        """As JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """What an edited model may lose against the unedited one, on the same texts and facts."""

    unedited: Scores
    max_rise: float  # of perplexity, in percent
    max_loss: float  # of specificity, in points

    def rise(self, scores: Scores) -> float:
        """Rise of perplexity in percent."""
        return 100.0 * (scores.perplexity / self.unedited.perplexity - 1.0)

    def value(self, scores: Scores) -> float:
        """What the search maximises: the score, or below 0 by how far a limit is exceeded."""
        excess = self.rise(scores) - self.max_rise
        if scores.specificity is not None and self.unedited.specificity is not None:
            excess = max(excess, self.unedited.specificity - scores.specificity - self.max_loss)
        if excess > 0 or not math.isfinite(excess):
            return -min(excess, _BROKEN) if math.isfinite(excess) else -_BROKEN
        return scores.score


class TrialRunner:
    """Runs trials on one model.

    Args:
        model: the unedited model; its weights are the same bits before and after every trial.
        tok: its tokenizer.
        batch_size: edits per batch.
        texts: held-out texts for perplexity.
        text_tokens: number of their tokens to read.
    """

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase, batch_size: int, texts: Sequence[str],
                 text_tokens: int) -> None:
        self._model, self._tok, self._batch_size = model, tok, batch_size
        self._texts, self._text_tokens = texts, text_tokens
        self._contexts: list[str] | None = None  # generated in the first trial

    def measure(self, records: Sequence[EditRecord], neighbours: int | None = None) -> Scores:
        """Score the model as it is, with at most ``neighbours`` neighbourhood prompts per fact (None for all)."""
        cut = [replace(record, neighborhood_prompts=record.neighborhood_prompts[:neighbours], generation_prompts=())
               for record in records]
        found = summarise(evaluate_records(self._model, self._tok, cut))
        means = {name: found[name]["mean"] for name in ("efficacy", "generalization", "specificity")}
        return Scores(**means, perplexity=perplexity(self._model, self._tok, self._texts, self._text_tokens).perplexity)

    def run(self, hparams: SPHEREHyperParams, records: Sequence[EditRecord], neighbours: int | None = None,
            at_half: Callable[[int, Scores], None] | None = None) -> Scores:
        """Edit the facts, and score the edited model.

        Args:
            at_half: called once, with the number of edits and the scores of their facts without neighbourhood prompts,
                after half of the facts. What it raises ends the trial.

        Raises:
            ValueError: the facts can't be edited with these hyperparameters.
        """
        editable = hparams.editable(self._model)
        session = EditSession()
        session.contexts = self._contexts
        is_half = at_half is None
        with editable.restoring(always=True):
            for first in range(0, len(records), self._batch_size):
                batch = records[first: first + self._batch_size]
                apply_sphere_to_model(self._model, self._tok, [record.request() for record in batch], hparams,
                                      session=session)
                self._contexts = session.contexts
                edited = first + len(batch)
                if at_half is not None and not is_half and len(records) / 2 <= edited < len(records):
                    is_half = True
                    at_half(edited, self.measure(records[:edited], neighbours=0))
            return self.measure(records, neighbours)
