"""What an edited model's own text is like: fluency and consistency of what it says about the edited subject.

The model goes on after each of a case's generation prompts; a text is the prompt with what follows it.

**Fluency** is the mean over the case's texts of ``100 * (2/3 H_2 + 4/3 H_3) / 2``, with ``H_n`` the entropy in **bits**
(logarithm to base 2, as in ROME's code) of the text's n-grams of words: ``-sum f log2 f`` over their relative
frequencies, 0 for a text of fewer than n words. Text that repeats itself is low, varied English of 100 tokens near 600.

**Consistency** is ``100 *`` the cosine of TF-IDF vectors of the case's texts, joined, and of its reference texts (see
:mod:`.references`).

Unlike ROME's code: its 100 tokens include the prompt's, it goes on behind an end token, and it splits words with NLTK's
punkt, which must be downloaded. Here a word is what :func:`words` says, named ``regex-treebank`` in results.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import nn
from transformers import PreTrainedTokenizerBase

from .bootstrap import MetricSummary, summary_of
from .datasets import EditRecord
from .generation import generate_continuations
from .references import References
from .teacher_forcing import Progress

WORDS: Final = "regex-treebank"
_CLITIC = r"n['\u2019]t\b|['\u2019](?:s|m|d|re|ve|ll)\b"
_COMPOUND = r"\w+(?:[-.,:/'\u2019]\w+)*"  # words and numbers with such signs inside
_WORD = re.compile(rf"{_CLITIC}|{_COMPOUND}?(?={_CLITIC})|{_COMPOUND}|\.{{2,}}|--+|\S", re.IGNORECASE)


@dataclass(frozen=True)
class Decoding:
    """How text is generated.

    Attributes:
        max_new_tokens: after a prompt; fewer where the model ends its text.
        top_k: tokens are drawn from so many likeliest (5 in ROME); None for greedy.
        seed: of the draws, with case_id and the prompt's place in its case: a text does not depend on other cases.
        prompts: of a case's generation prompts the first so many; None for all.
    """

    max_new_tokens: int = 100
    top_k: int | None = 5
    seed: int = 0
    prompts: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("top_k", self.top_k), ("prompts", self.prompts)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")

    def described(self) -> str:
        """For a result's protocol."""
        how = "greedy" if self.top_k is None else f"top-{self.top_k} seed {self.seed}"
        some = "" if self.prompts is None else f", first {self.prompts} prompts"
        return f"{how}, {self.max_new_tokens} new tokens{some}"


@dataclass(frozen=True)
class TextQuality:
    """What a model's text about one case is like.

    Attributes:
        case_id, dataset: of the record.
        fluency: bits times 100; None where the case has no generation prompts.
        consistency: 0 to 100; None where it has no prompts or no reference texts.
        fluency_protocol: how text was generated and split into words.
        consistency_protocol: where reference texts and vocabulary come from; None where consistency was not asked.
        texts: each prompt with what the model said.
    """

    case_id: int
    dataset: str
    fluency: float | None
    consistency: float | None
    fluency_protocol: str
    consistency_protocol: str | None
    texts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; :meth:`from_dict` gives back an equal object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TextQuality:
        """Of what :meth:`to_dict` gave, through JSON or not.

        Raises:
            ValueError: a field is missing or not known.
        """
        try:
            return cls(**{**data, "texts": tuple(data["texts"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is not what TextQuality.to_dict() gives ({error}): measure again") from error


def fluency_protocol(decoding: Decoding) -> str:
    """How text is generated and split into words, as results name it."""
    return f"{decoding.described()}; words by {WORDS}"


def measure_text_quality(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    references: References | None = None,
    decoding: Decoding | None = None,
    progress: Progress | None = None,
) -> list[TextQuality]:
    """Fluency of every record that has generation prompts, and consistency where it has references.

    Args:
        model: a causal language model of transformers; stays as it is.
        references: None measures no consistency.
        decoding: None for ``Decoding()``: 100 tokens, sampled as ROME does.
        progress: called with (prompts done, prompts in all).

    Returns:
        One for each record, in their order.

    Raises:
        ValueError: a prompt has no tokens, or passes the model's context with what is generated.
    """
    decoding = Decoding() if decoding is None else decoding
    asked = [(record, place, prompt) for record in records
             for place, prompt in enumerate(record.generation_prompts[: decoding.prompts])]
    seeds = None if decoding.top_k is None else [(decoding.seed, record.case_id, place) for record, place, _ in asked]
    said = generate_continuations(model, tok, [prompt for _, _, prompt in asked], decoding.max_new_tokens,
                                  decoding.top_k, seeds, progress)
    whole = iter([prompt + continuation for (_, _, prompt), continuation in zip(asked, said, strict=True)])
    found = []
    for record in records:
        texts = tuple(next(whole) for _ in record.generation_prompts[: decoding.prompts])
        found.append(TextQuality(
            case_id=record.case_id,
            dataset=record.dataset,
            fluency=math.fsum(map(fluency, texts)) / len(texts) if texts else None,
            consistency=references.consistency(record.case_id, " ".join(texts)) if texts and references else None,
            fluency_protocol=fluency_protocol(decoding),
            consistency_protocol=None if references is None else references.protocol,
            texts=texts,
        ))
    return found


def summarise_text_quality(qualities: Sequence[TextQuality], seed: int = 0, resamples: int = 1000
                           ) -> dict[str, MetricSummary]:
    """Means of fluency (bits times 100) and consistency (0 to 100) over cases, with 95% intervals by bootstrap.

    Raises:
        ValueError: there is nothing to summarise, it is of several protocols, or resamples is below 1.
    """
    if not qualities:
        raise ValueError("there are no texts to summarise: measure at least one record")
    protocols = {(one.fluency_protocol, one.consistency_protocol) for one in qualities}
    if len(protocols) > 1:
        raise ValueError(f"these are of several protocols ({sorted(map(str, protocols))}): summarise each on its own")
    return {"fluency": summary_of([one.fluency for one in qualities], 1.0, seed, resamples),
            "consistency": summary_of([one.consistency for one in qualities], 1.0, seed, resamples)}


def fluency(text: str) -> float:
    """``100 * (2/3 H_2 + 4/3 H_3) / 2`` of a text's words, in bits times 100."""
    said = words(text)
    return 100 * (2 / 3 * n_gram_entropy(said, 2) + 4 / 3 * n_gram_entropy(said, 3)) / 2


def n_gram_entropy(said: Sequence[str], n: int) -> float:
    """``-sum f log2 f`` over the relative frequencies of runs of n words, in bits; 0 where there is none."""
    counts = Counter(zip(*(said[start:] for start in range(n)), strict=False))
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


def words(text: str) -> list[str]:
    """Words and punctuation signs of a text, split much as the Penn Treebank does, by a regular expression.

    ``don't`` is ``do`` and ``n't``, ``Ann's`` is ``Ann`` and ``'s``; hyphens, points, commas, colons, slashes and
    apostrophes inside a word or number stay in it; any other sign is a word of its own, but for runs of points or
    dashes. A point behind a word is a word of its own, in abbreviations too.
    """
    return _WORD.findall(text)
