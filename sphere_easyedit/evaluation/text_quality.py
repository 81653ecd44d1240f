"""Fluency and consistency of the text that an edited model generates about the edited subject.

The model continues each of a case's generation prompts; a text is the prompt with its continuation.

**Fluency** is the mean over the case's texts of ``100 * (2/3 H_2 + 4/3 H_3) / 2``, with ``H_n`` the entropy in **bits**
(logarithm to base 2, as in ROME's code) of the text's word n-grams: ``-sum f log2 f`` over their relative frequencies,
0 for a text of fewer than n words. Repetitive text scores low, varied English of 100 tokens near 600.

**Consistency** is ``100 *`` the cosine of TF-IDF vectors of the case's texts, joined, and of its reference texts (see
:mod:`.references`).

ROME's code differs: its 100 tokens include the prompt's, it generates past an end token, and it splits words with
NLTK's punkt, which must be downloaded. Here :func:`words` splits them, named ``regex-treebank`` in results.
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

from ..datasets.loaders import EditRecord
from ..defaults import FLUENCY_TOKENS
from ..utils.progress import Progress
from .bootstrap import MetricSummary, summary_of
from .generation import generate_continuations
from .references import References

WORDS: Final = "regex-treebank"
_TOP_K: Final = 5
_CLITIC = r"n['\u2019]t\b|['\u2019](?:s|m|d|re|ve|ll)\b"
_COMPOUND = r"\w+(?:[-.,:/'\u2019]\w+)*"  # words and numbers with these characters inside
_WORD = re.compile(rf"{_CLITIC}|{_COMPOUND}?(?={_CLITIC})|{_COMPOUND}|\.{{2,}}|--+|\S", re.IGNORECASE)


@dataclass(frozen=True)
class Decoding:
    """How text is generated, by sampling from the 5 most likely tokens as ROME does.

    Attributes:
        max_new_tokens: maximum number of tokens after a prompt; fewer if the model generates an end token.
        seed: of sampling. Together with case_id and the prompt's index in its case it seeds each text, which therefore
            does not depend on other cases.
        prompts: number of generation prompts to use per case, from the first; None for all.
    """

    max_new_tokens: int = FLUENCY_TOKENS
    seed: int = 0
    prompts: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("prompts", self.prompts)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")

    def described(self) -> str:
        """A short description for a result's protocol."""
        some = "" if self.prompts is None else f", first {self.prompts} prompts"
        return f"top-{_TOP_K} seed {self.seed}, {self.max_new_tokens} new tokens{some}"


@dataclass(frozen=True)
class TextQuality:
    """Fluency and consistency of one case's generated texts.

    Attributes:
        case_id, dataset: of the record.
        fluency: bits times 100; None if the case has no generation prompts.
        consistency: 0 to 100; None if it has no generation prompts or no reference texts.
        fluency_protocol: how text was generated and split into words.
        consistency_protocol: where reference texts and vocabulary come from; None if consistency was not measured.
        texts: each prompt with its continuation.
    """

    case_id: int
    dataset: str
    fluency: float | None
    consistency: float | None
    fluency_protocol: str
    consistency_protocol: str | None
    texts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serialisable dict; :meth:`from_dict` reverses it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TextQuality:
        """Restore from the dict that :meth:`to_dict` returned, through JSON or not.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            return cls(**{**data, "texts": tuple(data["texts"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"these values were not written by TextQuality.to_dict() ({error}): measure again"
                             ) from error


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
    """Measure the fluency of each record with generation prompts, and the consistency of each with references.

    Args:
        model: a causal language model of transformers; stays as it is.
        references: None to not measure consistency.
        decoding: None for ``Decoding()``: 100 tokens, sampled as ROME does.
        progress: called with (prompts done, prompts in total).

    Returns:
        One result a record, in their order.

    Raises:
        ValueError: a prompt has no tokens, or exceeds the model's context together with its continuation.
    """
    decoding = Decoding() if decoding is None else decoding
    prompts = [(record.case_id, index, prompt) for record in records
               for index, prompt in enumerate(record.generation_prompts[: decoding.prompts])]
    seeds = [(decoding.seed, case_id, index) for case_id, index, _ in prompts]
    continuations = generate_continuations(model, tok, [prompt for _, _, prompt in prompts], decoding.max_new_tokens,
                                           _TOP_K, seeds, progress)
    all_texts = iter([prompt + added for (_, _, prompt), added in zip(prompts, continuations, strict=True)])
    qualities = []
    for record in records:
        texts = tuple(next(all_texts) for _ in record.generation_prompts[: decoding.prompts])
        qualities.append(TextQuality(
            case_id=record.case_id,
            dataset=record.dataset,
            fluency=math.fsum(map(fluency, texts)) / len(texts) if texts else None,
            consistency=references.consistency(record.case_id, " ".join(texts)) if texts and references else None,
            fluency_protocol=fluency_protocol(decoding),
            consistency_protocol=None if references is None else references.protocol,
            texts=texts,
        ))
    return qualities


def summarise_text_quality(qualities: Sequence[TextQuality], seed: int = 0, resamples: int = 1000
                           ) -> dict[str, MetricSummary]:
    """Means of fluency (bits times 100) and consistency (0 to 100) over cases, with 95% bootstrap intervals.

    Raises:
        ValueError: there are no results, they are of several protocols, or resamples is below 1.
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
    tokens = words(text)
    return 100 * (2 / 3 * n_gram_entropy(tokens, 2) + 4 / 3 * n_gram_entropy(tokens, 3)) / 2


def n_gram_entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy ``-sum f log2 f`` of the n-grams' relative frequencies f, in bits; 0 if there are none."""
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


def words(text: str) -> list[str]:
    """Split a text into words and punctuation by a regular expression, much as the Penn Treebank does.

    ``don't`` becomes ``do`` and ``n't``, ``Ann's`` becomes ``Ann`` and ``'s``. Hyphens, periods, commas, colons,
    slashes and apostrophes inside a word or number stay in it. Other punctuation is split off character by character,
    except that runs of periods or dashes stay together. A period after a word is split off, also in abbreviations.
    """
    return _WORD.findall(text)
