"""Facts that a session has edited, as token ids, for training on them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from .requests import TokenizedRequest


@dataclass(frozen=True)
class StoredFact:
    """A fact: its prompt alone and in each context template, and the target, in tokens."""

    prompts: tuple[tuple[int, ...], ...]
    target: tuple[int, ...]

    @classmethod
    def of(cls, request: TokenizedRequest) -> StoredFact:
        """The fact of an edit request."""
        return cls((request.plain.ids, *(prompt.ids for prompt in request.contexts)), request.target_ids)


@dataclass
class ReplayMemory:
    """Facts in the order of editing, with the last loss of each (nats per target token)."""

    facts: list[StoredFact] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def without_prompts_of(self, facts: Sequence[StoredFact]) -> ReplayMemory:
        """The memory without facts whose prompt one of ``facts`` has, too: the newer answer replaces theirs."""
        replaced = {fact.prompts[0] for fact in facts}
        kept = [index for index, fact in enumerate(self.facts) if fact.prompts[0] not in replaced]
        return ReplayMemory([self.facts[index] for index in kept], [self.losses[index] for index in kept])

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """Indices of up to ``count`` facts: half drawn at random, half those of the highest loss among more drawn."""
        order = torch.randperm(len(self.facts), generator=generator).tolist()
        hardest = sorted(order[: 4 * count], key=lambda index: -self.losses[index])[: count // 2]
        taken = set(hardest)
        rest = [index for index in order if index not in taken]
        return hardest + rest[: count - len(hardest)]

    def to_tensors(self) -> dict[str, Tensor]:
        """Tensors that ``from_tensors`` reads."""
        texts = [text for fact in self.facts for text in (*fact.prompts, fact.target)]
        return {"tokens": torch.tensor([token for text in texts for token in text], dtype=torch.int32),
                "lengths": torch.tensor([len(text) for text in texts], dtype=torch.int32),
                "texts": torch.tensor([len(fact.prompts) + 1 for fact in self.facts], dtype=torch.int32),
                "losses": torch.tensor(self.losses, dtype=torch.float32)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ReplayMemory:
        """The memory of ``to_tensors``; an empty one if there are no tensors."""
        if not tensors:
            return cls()
        tokens = iter(tensors["tokens"].tolist())
        texts = (tuple(islice(tokens, length)) for length in tensors["lengths"].tolist())
        facts = []
        for count in tensors["texts"].tolist():
            *prompts, target = islice(texts, count)
            facts.append(StoredFact(tuple(prompts), target))
        return cls(facts, tensors["losses"].tolist())
