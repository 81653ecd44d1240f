"""apply_sphere_to_model: EasyEdit's protocol, what becomes of an update, and that a failed batch leaves no trace."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from helpers.sessions import folder  # noqa: F401 - a fixture
from sphere_easyedit.editing import solve, update_writer
from sphere_easyedit.editing.requests import parse_requests
from sphere_easyedit.editing.solve import prepare_session, solve_batch, tokenize_batch
from sphere_easyedit.methods.prune import prune
from sphere_easyedit.methods.rect import rect
from sphere_easyedit.models.architecture import EditableModel

FAMILIES = ["llama", "gpt2", "qwen2"]
NAMES = {"llama": "model.layers.{}.mlp.down_proj.weight", "gpt2": "transformer.h.{}.mlp.c_proj.weight",
         "qwen2": "model.layers.{}.mlp.down_proj.weight"}
SECOND = [{"prompt": "The mother tongue of Marie Curie is", "subject": "Marie Curie", "target_new": "English",
           "case_id": "second"}]
MakeHparams = Callable[..., sphere.SPHEREHyperParams]
family_ = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def make(folder: Path) -> MakeHparams:
    def hparams(base_alg: str = "MEMIT", family: str = "llama", **changes: Any) -> sphere.SPHEREHyperParams:
        return tiny_hparams(folder / family, **{"v_num_grad_steps": 4, "base_alg": base_alg, **changes})

    return hparams


def oriented(family: str, weight: Tensor) -> Tensor:
    """A stored weight as ``(d_out, d_in)``."""
    return weight.T if family == "gpt2" else weight


def weights_of(model: nn.Module, family: str = "llama") -> dict[int, Tensor]:
    return {layer: oriented(family, model.get_parameter(NAMES[family].format(layer)).detach()).clone()
            for layer in (1, 2)}


def edit(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams, family: str = "llama",
         requests: Sequence[Mapping[str, Any]] = REQUESTS, **kwargs: Any) -> dict[int, Tensor]:
    """Edit one batch; the oriented weights after it."""
    sphere.apply_sphere_to_model(model, tok, requests, hparams, **kwargs)
    return weights_of(model, family)


def equal(first: Mapping[Any, Tensor], second: Mapping[Any, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def base_updates(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams
                 ) -> dict[int, Tensor]:
    """The base method's updates of a first batch, with nothing done to them."""
    editable = EditableModel(model, hparams.module_names(model.config), hparams.layers)
    session = sphere.EditSession()
    session.bind(editable, hparams)
    prepare_session(editable, tok, hparams, session)
    tokenized = tokenize_batch(editable, tok, parse_requests(REQUESTS), session)
    solution = solve_batch(editable, tokenized, hparams, session)
    return {layer: update if isinstance(update, Tensor) else update.dense()
            for layer, update in solution.updates.items()}


class Adding:
    """An executor of EasyEdit's protocol that adds known changes ``(d_out, d_in)`` in place."""

    def __init__(self, family: str, changes: Sequence[dict[int, Tensor]], failure: BaseException | None = None) -> None:
        self.family, self.changes, self.failure = family, list(changes), failure
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, model: nn.Module, tok: Any, requests: Any, hparams: Any, copy: bool = False,
                 return_orig_weights: bool = False, **kwargs: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        self.calls.append((model, tok, requests, hparams, copy, kwargs))
        originals = {}
        for layer, change in self.changes[(len(self.calls) - 1) % len(self.changes)].items():
            parameter = model.get_parameter(NAMES[self.family].format(layer))
            originals[NAMES[self.family].format(layer)] = parameter.detach().clone()
            with torch.no_grad():
                parameter.add_(oriented(self.family, change))
        if self.failure is not None:
            raise self.failure
        return model, originals if return_orig_weights else {}


def some_change(seed: int, scale: float = 0.1) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: scale * torch.randn(48, 80, generator=generator) for layer in (1, 2)}


def suppressed(weight: Tensor, change: Tensor, hparams: sphere.SPHEREHyperParams) -> Tensor:
    return sphere.PrincipalSpace.from_weight(weight, hparams.gamma).suppress(change, hparams.alpha)


# --- the protocol -------------------------------------------------------------------------------------------


@family_
def test_returns_the_model_and_original_weights(family: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, hparams = tiny_model(family), make("AlphaEdit", family)
    for requests in (REQUESTS, SECOND):  # those before this call, not those before the first
        stored = edited_weights(model, hparams)
        edited, originals = sphere.apply_sphere_to_model(model, tok, requests, hparams, return_orig_weights=True)
        assert edited is model
        assert list(originals) == [NAMES[family].format(layer) for layer in (1, 2)]
        for layer, before in stored.items():
            name = NAMES[family].format(layer)
            assert originals[name].shape == before.shape == ((80, 48) if family == "gpt2" else (48, 80))
            assert torch.equal(originals[name], before)
            assert not torch.equal(model.get_parameter(name), before)
            assert originals[name].data_ptr() != model.get_parameter(name).data_ptr()
    with torch.no_grad():  # as EasyEdit puts them back
        for name, original in originals.items():
            model.get_parameter(name)[...] = original
    assert all(torch.equal(model.get_parameter(name), original) for name, original in originals.items())


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT", "RECT", "PRUNE"])
def test_copy_leaves_the_model_untouched(base_alg: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, hparams = tiny_model("gpt2"), make(base_alg, "gpt2")
    before = state_of(model)
    copied, originals = sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, copy=True,
                                                     return_orig_weights=True)
    assert copied is not model
    assert (sphere.EditSession.of(copied).num_edits, sphere.EditSession.of(model).num_edits) == (3, 0)
    assert sphere.apply_sphere_to_model(copied, tok, SECOND, hparams, copy=True)[1] == {}
    assert equal(state_of(model), before)
    assert equal(weights_of(copied, "gpt2"), edit(tiny_model("gpt2"), tok, hparams, "gpt2"))
    assert all(torch.equal(original, before[name]) for name, original in originals.items())


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "PRUNE"])
def test_nothing_but_the_edited_weights_changes(base_alg: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model = tiny_model("llama").train()
    before = state_of(model)
    edit(model, tok, make(base_alg))
    after = state_of(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        NAMES["llama"].format(layer) for layer in (1, 2)}
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_random_state_is_left_alone(tok: PreTrainedTokenizerBase, make: MakeHparams, tmp_path: Path) -> None:
    """With contexts and statistics to be generated."""
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    edit(tiny_model("llama"), tok, make(context_templates=None, stats_dir=str(tmp_path)))
    assert torch.equal(torch.random.get_rng_state(), state)


# --- what becomes of an update ------------------------------------------------------------------------------


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT", "RECT", "PRUNE"])
@family_
def test_alpha_or_gamma_zero_is_the_base_method(family: str, base_alg: str, tok: PreTrainedTokenizerBase,
                                                make: MakeHparams) -> None:
    by_alpha = edit(tiny_model(family), tok, make(base_alg, family, alpha=0.0), family)
    by_gamma = edit(tiny_model(family), tok, make(base_alg, family, gamma=0.0), family)
    assert equal(by_alpha, by_gamma)
    projected = edit(tiny_model(family), tok, make(base_alg, family), family)
    assert not any(torch.equal(projected[layer], weight) for layer, weight in by_alpha.items())
    if base_alg in ("AlphaEdit", "MEMIT"):
        model = tiny_model(family)
        before, updates = weights_of(model, family), base_updates(model, tok, make(base_alg, family))
        assert equal(by_alpha, {layer: before[layer] + update for layer, update in updates.items()})
        staged = edit(tiny_model(family), tok, make(base_alg, family, alpha=0.0, projection_stage="layer"), family)
        assert equal(staged, by_alpha)


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
@family_
def test_update_is_the_suppressed_base_update(family: str, base_alg: str, tok: PreTrainedTokenizerBase,
                                              make: MakeHparams) -> None:
    hparams = make(base_alg, family, alpha=0.7, projection_stage="update")
    model = tiny_model(family)
    before, updates = weights_of(model, family), base_updates(model, tok, hparams)
    after = edit(model, tok, hparams, family)
    for layer, update in updates.items():
        expected = suppressed(before[layer], update, hparams)
        assert relative_error(after[layer] - before[layer], expected) < 1e-5
        assert relative_error(update, expected) > 0.05  # there was something to suppress


def test_alpha_one_leaves_nothing_of_the_principal_space(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model = tiny_model("gpt2")
    before = weights_of(model, "gpt2")
    after = edit(model, tok, make("MEMIT", "gpt2", alpha=1.0), "gpt2")
    for layer, weight in after.items():
        change = weight - before[layer]
        principal = sphere.PrincipalSpace.from_weight(before[layer], 0.5).directions
        assert float((change @ principal).norm()) < 1e-5 * float(change.norm())


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_stages_differ(base_alg: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    """The first layer is solved alike; the second sees what was projected in front of it, or does not."""
    before = weights_of(tiny_model("llama"))
    by_update = edit(tiny_model("llama"), tok, make(base_alg, projection_stage="update"))
    by_layer = edit(tiny_model("llama"), tok, make(base_alg, projection_stage="layer"))
    assert relative_error(by_layer[1] - before[1], by_update[1] - before[1]) < 1e-5
    assert relative_error(by_layer[2] - before[2], by_update[2] - before[2]) > 1e-2


def test_layer_stage_solves_on_projected_weights(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    """The last layer's update is the suppressed one of a solve that sees the first layer's projected weight."""
    hparams = make(projection_stage="layer")
    model = tiny_model("llama")
    before = weights_of(model)
    updates: dict[int, Tensor] = {}

    def note(layer: int, update: Any) -> Tensor:
        updates[layer] = suppressed(before[layer], update.dense(), hparams)
        return updates[layer]

    editable = EditableModel(model, hparams.module_names(model.config), hparams.layers)
    session = sphere.EditSession()
    session.bind(editable, hparams)
    prepare_session(editable, tok, hparams, session)
    solve_batch(editable, tokenize_batch(editable, tok, parse_requests(REQUESTS), session), hparams, session, note)
    assert equal(weights_of(model), before)  # solving changes nothing
    after = edit(model, tok, hparams)
    for layer, update in updates.items():
        assert relative_error(after[layer] - before[layer], update) < 1e-4


@family_
def test_rect_restrains_before_the_projection(family: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    hparams = make("RECT", family, rect_keep=0.3)
    model = tiny_model(family)
    before, updates = weights_of(model, family), base_updates(model, tok, hparams)
    alone = edit(tiny_model(family), tok, make("RECT", family, rect_keep=0.3, alpha=0.0), family)
    after = edit(model, tok, hparams, family)
    for layer, update in updates.items():
        kept = rect(update, before[layer], 0.3)
        assert 0.29 < float((kept != 0).float().mean()) < 0.31
        assert torch.equal(alone[layer], before[layer] + kept)
        assert relative_error(after[layer] - before[layer], suppressed(before[layer], kept, hparams)) < 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("log_base", [None, 10.0])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prune_shapes_what_is_read_out(family: str, log_base: float | None, alpha: float, tok: PreTrainedTokenizerBase,
                                       make: MakeHparams) -> None:
    """Read out is W0 + suppress(prune(unrestrained - W0)); editing goes on from the unrestrained weights."""
    strong = {"mom2_update_weight": 1.0, "v_lr": 1.0}
    hparams = make("PRUNE", family, prune_log_base=log_base, alpha=alpha, **strong)
    memit = make("MEMIT", family, alpha=0.0, **strong)
    model, unrestrained_model = tiny_model(family), tiny_model(family)
    original = weights_of(model, family)
    for requests in (REQUESTS, SECOND):
        after = edit(model, tok, hparams, family, requests)
        # Unrestrained, PRUNE is MEMIT: were the second batch solved on the weights read out, it would differ.
        unrestrained = edit(unrestrained_model, tok, memit, family, requests)
        assert equal(sphere.EditSession.of(model).unrestrained, unrestrained)
        for layer, weight in after.items():
            whole = unrestrained[layer] - original[layer]
            assert float(torch.linalg.svdvals(whole)[0]) > float(torch.linalg.svdvals(original[layer])[0])
            shaped = prune(whole, original[layer], log_base)
            assert relative_error(whole, shaped) > 0.02
            expected = original[layer] + suppressed(original[layer], shaped, hparams)
            assert relative_error(weight - original[layer], expected - original[layer]) < 1e-5


@family_
@pytest.mark.parametrize("space", ["current", "pretrained"])
def test_principal_space(space: str, family: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    """Of the weight before each batch, or of the unedited one; they part at the second batch."""
    hparams = make("FT", family, executor="easyedit", alpha=0.6, principal_space=space)
    model = tiny_model(family)
    original = weights_of(model, family)
    changes = [some_change(1, 2.0), some_change(2)]
    executor = Adding(family, changes)
    differ = []
    for change, requests in zip(changes, (REQUESTS, SECOND), strict=True):
        before = weights_of(model, family)
        after = edit(model, tok, hparams, family, requests, executor=executor)
        for layer in (1, 2):
            added = (before[layer] + change[layer]) - before[layer]  # as it survives being added
            expected = {"current": suppressed(before[layer], added, hparams),
                        "pretrained": suppressed(original[layer], added, hparams)}
            assert relative_error(after[layer] - before[layer], expected[space]) < 1e-5
            differ.append(relative_error(expected["current"], expected["pretrained"]))
    assert differ[0] == differ[1] == 0.0
    assert min(differ[2:]) > 1e-2


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT", "RECT", "PRUNE"])
def test_bfloat16_model(base_alg: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    before = weights_of(model)
    for requests in (REQUESTS, SECOND):
        after = edit(model, tok, make(base_alg), requests=requests)
        for layer, weight in after.items():
            assert weight.dtype == torch.bfloat16
            assert bool(torch.isfinite(weight).all())
            assert not torch.equal(weight, before[layer])
        before = after
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())


def test_bfloat16_is_projected_in_float32(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    hparams = make("FT", executor="easyedit", alpha=0.6)
    model = tiny_model("llama").to(torch.bfloat16)
    before = weights_of(model)
    changes = {layer: change.bfloat16() for layer, change in some_change(1).items()}
    after = edit(model, tok, hparams, executor=Adding("llama", [changes]))
    for layer, change in changes.items():
        added = (before[layer] + change).float() - before[layer].float()
        precise = before[layer].float() + suppressed(before[layer], added, hparams)
        assert torch.equal(after[layer], precise.bfloat16())


# --- around any executor ------------------------------------------------------------------------------------


@family_
@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"gamma": 0.0}], ids=str)
def test_executor_without_projection_leaves_its_own_bits(off: dict[str, float], family: str,
                                                         tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, change = tiny_model(family), some_change(1, 1e-9)
    for layer in change:  # bits that a difference and a sum would lose
        change[layer][0, 0] = 12345.678
    expected = {layer: weight + change[layer] for layer, weight in weights_of(model, family).items()}
    executor = Adding(family, [change])
    assert equal(edit(model, tok, make("FT", family, executor="easyedit", **off), family, executor=executor), expected)


@family_
def test_executors_change_is_projected(family: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, change = tiny_model(family), some_change(1)
    hparams = make("FT", family, executor="easyedit", alpha=0.8)
    before = weights_of(model, family)
    executor = Adding(family, [change])
    edited, originals = sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, executor=executor,
                                                     return_orig_weights=True, keep_original_weight=True, extra=3)
    assert edited is model
    for layer, weight in weights_of(model, family).items():
        expected = suppressed(before[layer], change[layer], hparams)
        assert relative_error(weight - before[layer], expected) < 1e-4
        assert torch.equal(oriented(family, originals[NAMES[family].format(layer)]), before[layer])
    [(got_model, got_tok, got_requests, got_hparams, copied, kwargs)] = executor.calls
    assert got_model is model
    assert got_tok is tok
    assert got_requests == REQUESTS
    assert got_hparams is hparams
    assert copied is False
    assert kwargs == {"keep_original_weight": True, "extra": 3}
    session = sphere.EditSession.of(model)
    assert (session.num_edits, session.num_batches) == (3, 1)


def test_executor_with_copy(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, executor = tiny_model("llama"), Adding("llama", [some_change(1)])
    before = state_of(model)
    copied, _ = sphere.apply_sphere_to_model(model, tok, REQUESTS, make("FT", executor="easyedit"), copy=True,
                                             executor=executor)
    assert equal(state_of(model), before)
    assert executor.calls[0][0] is copied
    assert not equal(weights_of(copied), weights_of(model))


def test_rect_around_an_executor(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, hparams = tiny_model("llama"), make("RECT")
    before = weights_of(model)
    change = {layer: torch.randint(-8, 9, (48, 80)) / 4.0 for layer in (1, 2)}
    after = edit(model, tok, hparams, executor=Adding("llama", [change]))
    for layer in (1, 2):
        kept = rect((before[layer] + change[layer]) - before[layer], before[layer], hparams.rect_keep)
        assert relative_error(after[layer] - before[layer], suppressed(before[layer], kept, hparams)) < 1e-5


def test_prune_around_an_executor(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, hparams = tiny_model("llama"), make("PRUNE")
    before, change = weights_of(model), some_change(1, 5.0)
    after = edit(model, tok, hparams, executor=Adding("llama", [change]))
    for layer in (1, 2):
        shaped = prune((before[layer] + change[layer]) - before[layer], before[layer])
        assert relative_error(after[layer] - before[layer], suppressed(before[layer], shaped, hparams)) < 1e-5


def test_easyedits_executor_needs_easyedit(tok: PreTrainedTokenizerBase, make: MakeHparams, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "easyeditor.py").write_text("raise ImportError('no torchvision')")
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(ImportError, match=r"EASYEDIT_HOME=.*no torchvision.*checkout of its main"):
        edit(model, tok, make("FT", executor="easyedit"))
    assert equal(state_of(model), before)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("failure", [RuntimeError("no memory"), KeyboardInterrupt()], ids=lambda f: type(f).__name__)
def test_executor_that_raises(failure: BaseException, alpha: float, tok: PreTrainedTokenizerBase,
                              make: MakeHparams) -> None:
    model, hparams = tiny_model("gpt2"), make("FT", "gpt2", executor="easyedit", alpha=alpha)
    edit(model, tok, hparams, "gpt2", executor=Adding("gpt2", [some_change(1)]))
    before = state_of(model)
    with pytest.raises(type(failure)):
        edit(model, tok, hparams, "gpt2", executor=Adding("gpt2", [some_change(2)], failure))
    assert equal(state_of(model), before)
    assert sphere.EditSession.of(model).num_batches == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("base_alg", "changes"), [
    ("FT", {"executor": "easyedit", "alpha": 0.0}), ("FT", {"executor": "easyedit"}), ("MEMIT", {}), ("RECT", {}),
    ("RECT", {"alpha": 0.0})], ids=str)
def test_executor_that_writes_non_finite_values(base_alg: str, changes: dict[str, Any], bad: float,
                                                tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, hparams = tiny_model("llama"), make(base_alg, **changes)
    change = some_change(1)
    change[2][4, 5] = bad  # the first layer is written by then
    before = state_of(model)
    with pytest.raises(ValueError, match="finite"):
        edit(model, tok, hparams, executor=Adding("llama", [change]))
    assert equal(state_of(model), before)
    assert sphere.EditSession.of(model).num_batches == 0


# --- a failed batch leaves no trace -------------------------------------------------------------------------


class Failing:
    """Calls a function as it is, but raises at one call."""

    def __init__(self, function: Callable[..., Any], at: int, failure: BaseException) -> None:
        self._function, self._left, self._failure = function, at, failure
        self.raised = False

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self.raised = True
            raise self._failure
        return self._function(*args, **kwargs)


class _FailingCallback(sphere.EditCallback):
    def on_batch_end(self, event: sphere.EditEvent) -> None:
        raise RuntimeError("refused")


# Where it happens: object, attribute, which call.
PLACES: dict[str, tuple[Any, str, int]] = {
    "target values": (solve, "target_values", 1),
    "solve of the second layer": (solve, "adjusted_keys", 2),
    "earlier keys": (solve.KeyHistory, "extended", 1),
    "projection of the second layer": (sphere.PrincipalSpace, "suppress_keys", 2),
    "projection of the second whole change": (sphere.PrincipalSpace, "suppress", 2),
    "writing the second layer": (update_writer, "add_update", 2),
    "callback": (sphere.EditCallback, "on_batch_end", 1),
    "committing": (sphere.EditSession, "commit", 1),
}
CASES = [("MEMIT", "callback"), ("RECT", "callback")]
CASES += [("AlphaEdit", place) for place in PLACES if "whole change" not in place]
CASES += [("PRUNE", place) for place in PLACES if place != "projection of the second layer" and place != "earlier keys"]


def _snapshot(session: sphere.EditSession) -> tuple[Any, ...]:
    return (session.num_edits, session.num_batches, list(session.contexts or []),
            {layer: history.keys.clone() for layer, history in session.history.items()},
            {layer: weight.clone() for layer, weight in session.unrestrained.items()},
            {layer: weight.clone() for layer, weight in session.original.items()})


def _assert_same(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    assert first[:3] == second[:3]
    for mine, theirs in zip(first[3:], second[3:], strict=True):
        nonempty = [{k: v for k, v in part.items() if v.numel()} for part in (mine, theirs)]
        assert equal(*nonempty)


@pytest.mark.parametrize("failure", [RuntimeError("injected"), KeyboardInterrupt()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize(("base_alg", "place"), CASES)
def test_failed_batch_leaves_no_trace(base_alg: str, place: str, failure: BaseException, tok: PreTrainedTokenizerBase,
                                      make: MakeHparams, monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = make(base_alg, v_num_grad_steps=2)
    undisturbed, model = tiny_model("llama"), tiny_model("llama")
    for each in (undisturbed, model):
        edit(each, tok, hparams)
    expected = edit(undisturbed, tok, hparams, requests=SECOND)
    before, session = state_of(model), sphere.EditSession.of(model)
    snapshot = _snapshot(session)
    owner, name, at = PLACES[place]
    failing = Failing(getattr(owner, name), at, failure)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(type(failure)):
            edit(model, tok, hparams, requests=SECOND, callbacks=[sphere.EditCallback()])
    assert failing.raised
    assert equal(state_of(model), before)
    _assert_same(_snapshot(session), snapshot)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert equal(edit(model, tok, hparams, requests=SECOND), expected)
    assert sphere.EditSession.of(model) is session
    _assert_same(_snapshot(session), _snapshot(sphere.EditSession.of(undisturbed)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_target_values_that_are_not_finite(value: float, tok: PreTrainedTokenizerBase, make: MakeHparams,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    real = solve.target_values

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        found.values[1, 7] = value
        return found

    model = tiny_model("llama")
    before = state_of(model)
    monkeypatch.setattr(solve, "target_values", spoiled)
    with pytest.raises(ValueError, match=r"target values of case_id \[1\] are not finite"):
        edit(model, tok, make())
    assert equal(state_of(model), before)
    assert sphere.EditSession.of(model).num_batches == 0


# --- callbacks ----------------------------------------------------------------------------------------------


class _Notes(sphere.EditCallback):
    """Writes down every event, with copies of the weights it came with."""

    def __init__(self, log: list[tuple[str, str]], name: str = "") -> None:
        self.log, self.name = log, name
        self.events: list[tuple[sphere.EditEvent, dict[int, Tensor]]] = []

    def on_batch_start(self, event: sphere.EditEvent) -> None:
        self.log.append((self.name, "start"))
        self.events.append((event, {layer: weight.clone() for layer, weight in event.weights.items()}))

    def on_batch_end(self, event: sphere.EditEvent) -> None:
        self.log.append((self.name, "end"))
        self.events.append((event, {layer: weight.clone() for layer, weight in event.weights.items()}))


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT", "RECT", "PRUNE"])
@family_
def test_events(family: str, base_alg: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    log: list[tuple[str, str]] = []
    first, second = _Notes(log, "first"), _Notes(log, "second")
    model, hparams = tiny_model(family), make(base_alg, family)
    weights = [weights_of(model, family)]
    finished: list[int] = []
    for requests in (REQUESTS, SECOND):
        weights.append(edit(model, tok, hparams, family, requests, callbacks=[first, second],
                            progress=finished.append))
    assert log == [("first", "start"), ("second", "start"), ("first", "end"), ("second", "end")] * 2
    assert sum(finished) == 4
    for notes in (first, second):
        events = [event for event, _ in notes.events]
        assert [(event.num_edits, event.num_batches) for event in events] == [(0, 0), (3, 1), (3, 1), (4, 2)]
        assert [list(event.case_ids) for event in events] == [[0, 1, 2], [0, 1, 2], ["second"], ["second"]]
        assert all(event.model is model for event in events)
        for (_, seen), index in zip(notes.events, (0, 1, 1, 2), strict=True):
            assert equal(seen, weights[index])  # start: before any change; end: in place
        for start in events[::2]:
            assert (list(start.losses), dict(start.update_norms), dict(start.seconds)) == ([], {}, {})
        for batch, end in enumerate(events[1::2]):
            assert len(end.losses) == len(end.case_ids)
            assert all(loss > 0 for loss in end.losses)
            assert all(value >= 0 for value in end.seconds.values())
            assert {"target_values", "solve", "projection"} <= set(end.seconds)
            for layer in (1, 2):
                norm = float((weights[batch + 1][layer].double() - weights[batch][layer].double()).norm())
                assert end.update_norms[layer] == pytest.approx(norm, rel=1e-12)
                assert norm > 0


def test_losses_are_those_of_the_target_values(tok: PreTrainedTokenizerBase, make: MakeHparams,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    real, found = solve.target_values, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(real(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(solve, "target_values", noted)
    notes = _Notes([])
    edit(tiny_model("llama"), tok, make(), callbacks=[notes])
    assert list(notes.events[1][0].losses) == found[0].losses
    assert len(set(found[0].losses)) == 3


def test_events_around_an_executor(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, notes, change = tiny_model("llama"), _Notes([]), some_change(1)
    hparams = make("FT", executor="easyedit", alpha=0.9)
    before = weights_of(model)
    after = edit(model, tok, hparams, executor=Adding("llama", [change]), callbacks=[notes])
    (start, seen_before), (end, seen_after) = notes.events
    assert (start.num_edits, end.num_edits, end.num_batches, list(end.losses)) == (0, 3, 1, [])
    assert equal(seen_before, before)
    assert equal(seen_after, after)
    for layer in (1, 2):
        norm = float((after[layer].double() - before[layer].double()).norm())
        assert end.update_norms[layer] == pytest.approx(norm, rel=1e-12)
        assert norm < 0.99 * float(change[layer].norm())  # of what was projected, not of what the executor did
    assert set(end.seconds) == {"preparation", "executor", "projection"}


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT", "RECT", "PRUNE"])
def test_tracking_changes_nothing(base_alg: str, tok: PreTrainedTokenizerBase, make: MakeHparams,
                                  tmp_path: Path) -> None:
    hparams = make(base_alg, v_num_grad_steps=2)
    watched, alone = tiny_model("llama"), tiny_model("llama")
    tracker = sphere.HETracker(tmp_path / "energy.csv")
    for requests in (REQUESTS, SECOND):
        edit(watched, tok, hparams, requests=requests, callbacks=[tracker])
        edit(alone, tok, hparams, requests=requests)
    assert equal(state_of(watched), state_of(alone))
    assert [record.num_edits for record in tracker.records] == [0, 3, 4]
    energy = float(sphere.hyperspherical_energy(weights_of(alone)[1]))
    assert tracker.records[2].energy[1] == pytest.approx(energy, rel=1e-8)


def test_tracker_survives_an_undone_batch(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    """A callback behind the tracker refuses a batch; the next one goes on with the records that were there."""
    hparams, model, tracker = make(v_num_grad_steps=2), tiny_model("llama"), sphere.HETracker()
    edit(model, tok, hparams, callbacks=[tracker])
    start = tracker.records[0]
    with pytest.raises(RuntimeError, match="refused"):
        edit(model, tok, hparams, requests=SECOND, callbacks=[tracker, _FailingCallback()])
    edit(model, tok, hparams, requests=SECOND, callbacks=[tracker])
    assert [record.num_edits for record in tracker.records] == [0, 3, 4]
    assert tracker.records[0] == start


def test_executor_that_swaps_storage_is_measured(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    """An executor may put another tensor into the parameter; events must tell of the weights that then count."""

    def swap(model: nn.Module, _tok: Any, _requests: Any, hparams: Any, **_: Any) -> Any:
        for layer in hparams.layers:
            parameter = model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")
            parameter.data = parameter.data + 0.5
        return model, {}

    hparams = make(alpha=0.0, projection_stage="update")
    tracker = sphere.HETracker()
    sphere.apply_sphere_to_model(tiny_model("llama"), tok, REQUESTS, hparams, executor=swap, callbacks=[tracker])
    assert all(change != 0.0 for change in tracker.records[-1].relative_change.values())


def _further(model: nn.Module, *_: Any, **__: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    name = "model.layers.0.mlp.down_proj.weight"
    original = {name: model.get_parameter(name).detach().clone()}
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    return model, original


@pytest.mark.parametrize(("executor", "message"), [
    (lambda model, *_, **__: (copy.deepcopy(model), {}), "in place"), (_further, "layers.0")], ids=["copy", "further"])
def test_executor_that_edits_something_else_is_undone_and_refused(executor: Callable[..., Any], message: str,
                                                                  tok: PreTrainedTokenizerBase, make: MakeHparams
                                                                  ) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, make(projection_stage="update"), executor=executor)
    assert equal(state_of(model), before)
    assert sphere.EditSession.of(model).num_edits == 0


def test_values_set_after_construction_are_checked(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, hparams = tiny_model("llama"), make()
    hparams.alpha = -0.5
    before = edited_weights(model, hparams)
    with pytest.raises(ValueError, match="alpha"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    assert all(torch.equal(before[layer], weight) for layer, weight in edited_weights(model, hparams).items())
