"""Context templates: short texts by the model itself, in front of which a prompt must mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from ..models import EditableModel

OPENINGS = ("The", "Therefore", "Because", "I", "You")  # MEMIT's and EasyEdit's
NEW_TOKENS = 9
_TOP_K = 5


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers by ``seed`` inside the context; the global state, on every device, as before it afterwards."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate_contexts(editable: EditableModel, tok: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """One continuation of each opening, sampled from the five likeliest tokens, as a template ``"... . {}"``.

    The global random state is left as it was.
    """
    device = editable.input_device
    templates = []
    with seeded(seed):
        for opening in OPENINGS:
            encoded = tok(opening, return_tensors="pt").to(device)
            out = editable.model.generate(  # type: ignore[operator]
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], do_sample=True, top_k=_TOP_K,
                max_new_tokens=NEW_TOKENS, pad_token_id=tok.pad_token_id if tok.pad_token_id is not None else 0)
            text = str(tok.decode(out[0], skip_special_tokens=True))
            # Braces would be taken for the place of the prompt.
            templates.append(text.replace("{", " ").replace("}", " ") + ". {}")
    return templates
