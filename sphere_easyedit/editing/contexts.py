"""Generates context templates: short texts, sampled from the model, that are put before a prompt."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from ..models.architecture import EditableModel
from ..models.sampling import generator_on, sample_tokens

OPENINGS = ("The", "Therefore", "Because", "I", "You")  # MEMIT's and EasyEdit's
NEW_TOKENS = 9
_TOP_K = 5


@torch.no_grad()
def generate_contexts(editable: EditableModel, tok: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """One continuation of each opening, sampled from the top 5 tokens, as a template ``"... . {}"``."""
    generator = generator_on(editable.input_device, seed)
    padding = tok.pad_token_id if tok.pad_token_id is not None else 0
    templates = []
    for opening in OPENINGS:
        encoded = tok(opening, return_tensors="pt").to(editable.input_device)
        out = sample_tokens(editable.model, encoded["input_ids"], encoded["attention_mask"], generator, top_k=_TOP_K,
                            max_new_tokens=NEW_TOKENS, pad_token_id=padding)
        text = str(tok.decode(out[0], skip_special_tokens=True))
        # A template has no braces but the prompt's.
        templates.append(text.replace("{", " ").replace("}", " ") + ". {}")
    return templates
