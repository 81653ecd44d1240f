"""Keys and values of prefixes: what rows share runs once, and nothing comes out otherwise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import relative_error, tiny_model
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.module_discovery import module_names
from sphere_easyedit.models.replay import as_rows, prefix_key_values

STEMS = {0: [5, 6, 7, 8, 9, 10], 1: [11, 12, 13, 14], 2: [15, 16]}


def editable_of(family: str) -> EditableModel:
    model = tiny_model(family)
    return EditableModel(model, module_names(model.config), [1, 2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma3_text"])
def test_shared_beginnings_change_nothing(family: str) -> None:
    editable = editable_of(family)
    prefixes = [[*STEMS[0], 20, 21], [*STEMS[0], 22], [*STEMS[0]], [*STEMS[1], 23, 24, 25], [*STEMS[1], 26],
                [*STEMS[2], 27], [*STEMS[2], 28], [29, 30, 31], []]
    groups = [0, 0, 0, 1, 1, 2, 2, 3, 4]
    alone, shared = prefix_key_values(editable, prefixes, 4), prefix_key_values(editable, prefixes, 4, groups)
    for block in range(4):
        for one, other in zip(alone[block], shared[block], strict=True):
            assert one.shape == other.shape
            assert relative_error(other, one) < 1e-5


def test_what_is_shared_runs_once() -> None:
    editable = editable_of("llama")
    tokens: list[int] = []
    editable.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True)
    prefixes = [[*range(10, 22), 30 + row] for row in range(8)]
    prefix_key_values(editable, prefixes, 4)
    prefix_key_values(editable, prefixes, 4, [0] * 8)
    assert tokens == [8 * 13, 12, 8]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(20, 60), max_size=4)), min_size=1, max_size=6))
def test_any_grouping(rows: list[tuple[int, list[int]]]) -> None:
    editable = editable_of("llama")
    prefixes = [[*STEMS[group], *rest] for group, rest in rows]
    alone = prefix_key_values(editable, prefixes, 4)
    shared = prefix_key_values(editable, prefixes, 4, [group for group, _ in rows])
    for block in range(4):
        for one, other in zip(alone[block], shared[block], strict=True):
            assert relative_error(other, one) < 1e-5


def test_flattened_states_are_viewed_by_row_and_token() -> None:
    states = torch.randn(3, 4, 5)
    for given_states in (states, states.reshape(12, 5), states.reshape(1, 12, 5)):
        viewed = as_rows(given_states, 3, 4, "block.0.fc2")
        assert torch.equal(viewed, states) and viewed.data_ptr() == states.data_ptr()


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 5), (13, 5), (2, 12, 5), (5,)])
def test_states_of_some_of_the_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^block\.0\.experts\.1\.w2 saw states of shape .* 3 rows of 4 tokens.*dense"
                       ) as error:
        as_rows(torch.zeros(shape), 3, 4, "block.0.experts.1.w2")
    assert "\n" not in str(error.value)
