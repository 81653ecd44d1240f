"""Computing in another precision, and what returns after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.models import tiny_model
from sphere_easyedit.models.reduced_precision import computing_in


def test_the_head_computes_in_it_and_the_embedding_it_is_tied_to_does_not() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids, state = torch.tensor([[1, 2]]), torch.randn(3, head.weight.shape[1])
    exact = head(state)
    with computing_in([head], torch.bfloat16):
        rounded = head(state)
        assert embedding(ids).dtype == torch.float32
        assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, state.bfloat16() @ embedding.weight.bfloat16().T)
    assert head.weight is embedding.weight
    assert torch.equal(head(state), exact)


def test_weights_return_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with pytest.raises(KeyError), computing_in([module], torch.bfloat16):
        assert {buffer.dtype for _, buffer in module.named_buffers()} == {torch.bfloat16, torch.int64}
        raise KeyError
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert module(torch.randn(4, 3)).dtype == torch.float32  # its hook is gone, too


def test_the_lowest_value_of_a_mask_stays_finite() -> None:
    class Masked(nn.Module):
        def forward(self, scores: torch.Tensor, mask: tuple[torch.Tensor]) -> torch.Tensor:
            return (scores + mask[0]).softmax(-1)

    module = Masked()
    mask = torch.full((1, 4), torch.finfo(torch.float32).min)
    with computing_in([module], torch.bfloat16):
        out = module(torch.zeros(1, 4), mask=(mask,))
    assert out.tolist() == [[0.25] * 4]


def test_weights_that_are_not_in_memory_are_refused() -> None:
    module = nn.Linear(3, 2, device="meta")
    reason = r"^target_dtype can't be used with weight of Linear, which is offloaded or quantised"
    with pytest.raises(ValueError, match=reason), computing_in([module], torch.bfloat16):
        pass
