"""Samples tokens from a model with a given random number generator."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

# Settings that change the probabilities in generate(), in its order: the neutral value, and transformers' class.
_WARPERS: Mapping[str, tuple[float | None, str]] = MappingProxyType({
    "temperature": (1.0, "TemperatureLogitsWarper"), "top_h": (None, "TopHLogitsWarper"),
    "top_k": (0, "TopKLogitsWarper"), "top_p": (1.0, "TopPLogitsWarper"), "min_p": (None, "MinPLogitsWarper"),
    "typical_p": (1.0, "TypicalLogitsWarper"), "epsilon_cutoff": (0.0, "EpsilonLogitsWarper"),
    "eta_cutoff": (0.0, "EtaLogitsWarper"),
})


def sample_tokens(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, generator: torch.Generator,
                  **settings: Any) -> Tensor:
    """Continue rows of tokens at random by ``model.generate``, with a given generator.

    The tokens are those of ``generate(do_sample=True, **settings)`` after ``torch.manual_seed`` with the generator's
    seed. The global random state, which all threads share, is neither read nor changed.

    Args:
        input_ids, attention_mask: ``(rows, tokens)``, without padding.
        generator: on the device of ``input_ids``.
        settings: arguments of ``generate``; the defaults are those of the model's ``generation_config``.

    Returns:
        Token ids ``(rows, tokens)``, the given ones first.

    Raises:
        ValueError: the model's probabilities are not finite.
    """
    # generate() samples with the global generator only. So it decodes greedily, and a processor draws the token, after
    # the warpers, which generate() would otherwise add after all given processors.
    own = getattr(model, "generation_config", None)
    processors: list[LogitsProcessor] = []
    for name, (neutral, warper) in _WARPERS.items():
        value = settings.pop(name, getattr(own, name, None))
        if value is not None and value != neutral:
            processors.append(getattr(transformers, warper)(value))
    # Greedy decoding warns about sampling settings, so the model's are set to transformers' defaults.
    defaults = {name: 50 if name == "top_k" else neutral for name, (neutral, _) in _WARPERS.items()}
    unused = {name: value for name, value in {**defaults, "penalty_alpha": None}.items() if hasattr(own, name)}
    found: Tensor = model.generate(  # type: ignore[operator]
        input_ids, attention_mask=attention_mask, do_sample=False, num_beams=1, num_return_sequences=1,
        return_dict_in_generate=False, logits_processor=LogitsProcessorList([*processors, _Drawing(generator)]),
        **{**unused, **settings})
    return found


class _Drawing(LogitsProcessor):
    """Draws each row's next token by its probabilities, and excludes all others."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(rows, vocabulary)``: 0 for the token that was drawn, else -inf."""
        probabilities = scores.softmax(dim=-1)
        if not bool(torch.isfinite(probabilities).all()):
            raise ValueError("the model's probabilities of the next token are not finite: its weights are damaged, or "
                             f"too large for {scores.dtype}")
        drawn = torch.multinomial(probabilities.to(self._generator.device), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.to(scores.device), 0.0)


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """A new random number generator on a device."""
    return torch.Generator(device).manual_seed(seed)
