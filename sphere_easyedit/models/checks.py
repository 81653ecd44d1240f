"""Checks of the arguments of public functions: model, tokenizer, causality and the state of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.messages import one_line
from .architecture import check_token_ids, input_device
from .module_discovery import output_embeddings

# Largest change of logits caused by a later token, in standard deviations of logits; above rounding, also where a
# router sends bfloat16 tokens to other experts.
_CAUSAL = 0.1
_LOAD = "load a causal language model with transformers' AutoModelForCausalLM.from_pretrained"


def check_model(model: object) -> None:
    """Refuse everything but a transformers decoder, neither wrapped nor compiled.

    Raises:
        TypeError: it is not a model, or a wrapper around one (``DataParallel``, ``torch.compile``, a pipeline).
        ValueError: it is an encoder-decoder, has no LM head, or a module of it is compiled.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        # Attributes under which wrappers of torch, DeepSpeed and FSDP keep the model; some forward its config.
        for name in ("module", "_orig_mod"):
            if isinstance(getattr(model, name, None), nn.Module):
                raise TypeError(f"the model is wrapped in a {kind}: give the model itself, model.{name}")
        if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), PretrainedConfig):
            inner = "; give its model, .model" if isinstance(getattr(model, "model", None), PreTrainedModel) else ""
            raise TypeError(f"the model is a {kind}, not a transformers model{inner or f': {_LOAD}'}")
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder, and only decoders can be edited and evaluated: {_LOAD}")
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate() and output_embeddings(model) is None:
        raise ValueError(f"{kind} has no LM head: {_LOAD}")
    for name, module in model.named_modules():
        # Compiled code does not run hooks added later: keys and values would be wrong.
        if "_orig_mod" in vars(module).get("_modules", {}) or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{name or 'the model'} is compiled, so hooks on its modules don't run: edit and evaluate "
                             "the model as it was loaded, and compile it afterwards")


@torch.no_grad()
def check_causal(model: nn.Module, ids: Sequence[int]) -> None:
    """Refuse a model whose attention is not causal.

    Prefix language models (PaliGemma), and some models with a flag in their config, attend in both directions: the
    loss of a target in one forward pass has then seen the target, and keys depend on what follows the subject.

    Args:
        model: in evaluation mode.
        ids: tokens of any text, two or more.

    Raises:
        ValueError: logits of earlier tokens depend on the last one, or the model does not run on text alone.
    """
    check_token_ids(model, max(ids))
    rows = torch.tensor([list(ids), [*ids[:-1], ids[0]]], device=input_device(model))
    with decoder_errors(model):
        try:
            logits: torch.Tensor = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False
                                         ).logits[:, :-1].float()
        except ValueError as error:  # the model's own, without a remedy
            raise TypeError(one_line(error)) from error
    moved, spread = float((logits[0] - logits[1]).abs().max()), float(logits.std())
    if moved > _CAUSAL * spread:
        raise ValueError(f"{type(model).__name__} is not causal (another last token changes the logits before it by "
                         f"{moved:.3g}, at a standard deviation of {spread:.3g}): give a decoder-only causal language "
                         "model")


@contextmanager
def decoder_errors(model: nn.Module) -> Iterator[None]:
    """Turn the errors of a model that can't be called like a transformers decoder into a ValueError of one line."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} does not run like a transformers decoder, on input_ids, "
                         f"attention_mask and position_ids, block by block: {one_line(error).rstrip('.')}: "
                         "this architecture can't be edited") from error


def check_inputs(model: object, tok: object) -> None:
    """``check_model`` and ``check_tokenizer``."""
    check_model(model)
    check_tokenizer(tok)


def check_parameters(model: nn.Module) -> None:
    """Refuse a model whose parameters can't be modified (ValueError)."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("the model's parameters were created under torch.inference_mode, so they can't be modified "
                         "outside it: load the model outside of torch.inference_mode")


def check_tokenizer(tok: object) -> None:
    """Refuse everything but a transformers tokenizer (TypeError)."""
    if isinstance(tok, PreTrainedTokenizerBase):
        return
    found = "None" if tok is None else f"a {type(tok).__name__}"
    inner = isinstance(getattr(tok, "tokenizer", None), PreTrainedTokenizerBase)
    remedy = "give its tokenizer, .tokenizer" if inner else \
        "give the model's own, as AutoTokenizer.from_pretrained loads it"
    raise TypeError(f"the tokenizer is {found}, not a transformers tokenizer: {remedy}")


@contextmanager
def default_torch_settings() -> Iterator[None]:
    """Run with PyTorch's default settings in this thread, whatever the caller has set.

    Gradients are enabled, inference mode and autocast are off, and new tensors are created on the CPU.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
