"""Gram matrices carried from batch to batch: as good as computed anew, kept where used, gone when the weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import relative_error, tiny_hparams, tiny_model
from sphere_easyedit.core.hyperspherical import energy_from_gram, hyperspherical_energy
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.editing.gram_matrices import GramMatrices, GramMatrix
from sphere_easyedit.methods.rect import rect

LAYERS = (1, 2)
SUBJECTS = ["France", "Brazil", "Marie Curie", "Albert Einstein", "Italy", "Rome", "John Smith"]
BATCHES = [[{"prompt": "The capital of {} is", "subject": subject, "target_new": "Paris"}] for subject in SUBJECTS]
MakeHparams = Callable[..., sphere.SPHEREHyperParams]


def weight_of(d_out: int, d_in: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Entries of an LLM's size, with a direction that all rows share and a few strong ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(d_out, d_in, generator=generator) + 0.005 * torch.randn(1, d_in, generator=generator)
    strong = torch.randn(d_out, 8, generator=generator) @ torch.randn(8, d_in, generator=generator)
    return (weight + 0.003 * strong).to(dtype)


def update_of(weight: Tensor, relative_norm: float, n: int = 4, seed: int = 1) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(weight.shape[0], n, generator=generator)
    keys = torch.randn(weight.shape[1], n, generator=generator)
    return LowRankUpdate(values * (relative_norm * weight.float().norm() / (values @ keys.T).norm()), keys)


def exact(weight: Tensor) -> Tensor:
    return weight.double() @ weight.double().T


# --- one matrix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3), (30, 50), (600, 700), (1100, 1200)])
def test_from_a_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(*shape, dtype)
    gram = GramMatrix.of(weight)
    precise = dtype == torch.float64 or shape[0] <= 1024
    assert gram.matrix.dtype == (torch.float64 if precise else torch.float32)
    assert relative_error(gram.matrix, exact(weight)) < (1e-14 if precise else 1e-6)
    assert relative_error(gram.matrix.T, gram.matrix) < (1e-15 if precise else 1e-7)
    assert gram.advances == 0


def test_rows_too_large_or_small_for_float32() -> None:
    weight = weight_of(1100, 1200)
    weight[3], weight[4], weight[5] = 0.0, weight[4] * 1e-25, weight[5] * 1e25
    gram = GramMatrix.of(weight).matrix
    torch.testing.assert_close(gram, exact(weight), rtol=1e-6, atol=0)
    weight[4:6] = 0.0
    assert GramMatrix.of(weight).matrix.dtype == torch.float32


@pytest.mark.parametrize("shape", [(30, 50), (1100, 1200)])
@pytest.mark.parametrize("relative_norm", [1e-3, 1.0])
def test_after_an_update(shape: tuple[int, int], relative_norm: float) -> None:
    weight = weight_of(*shape)
    update = update_of(weight, relative_norm)
    gram = GramMatrix.of(weight)
    before = gram.matrix.clone()
    advanced = gram.after(weight, update)
    assert advanced is not None
    assert advanced.advances == 1
    assert advanced.matrix.dtype == gram.matrix.dtype
    assert relative_error(advanced.matrix, exact(weight + update.dense())) < 1e-6
    assert torch.equal(gram.matrix, before)


def test_not_for_ever() -> None:
    weight = weight_of(20, 30)
    gram: GramMatrix | None = GramMatrix.of(weight)
    count = 0
    while gram is not None:
        update = update_of(weight, 1e-3, seed=count)
        gram, weight, count = gram.after(weight, update), weight + update.dense(), count + 1
    assert count == 51


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_not_where_rounding_outweighs_the_update(dtype: torch.dtype) -> None:
    weight = weight_of(20, 30, dtype)
    assert GramMatrix.of(weight).after(weight, update_of(weight, 1e-3)) is None


def test_not_where_a_row_cancels() -> None:
    weight = weight_of(20, 30)
    values = torch.zeros(20, 1)
    values[7] = -0.999
    assert GramMatrix.of(weight).after(weight, LowRankUpdate(values, weight[7][:, None].clone())) is None


def test_zero_rows() -> None:
    weight = weight_of(20, 30)
    weight[:2] = 0.0
    update = update_of(weight, 1e-2)
    update.values[0] = 0.0  # one stays zero, one gets a direction
    advanced = GramMatrix.of(weight).after(weight, update)
    assert advanced is not None
    assert relative_error(advanced.matrix, exact(weight + update.dense())) < 1e-7
    assert float(advanced.matrix[0].abs().max()) == 0.0


# --- many batches -------------------------------------------------------------------------------------------


class _Layer:
    """As much of an ``EditableModel`` as ``GramMatrices`` needs: one weight."""

    layers = (0,)

    def __init__(self, weight: Tensor) -> None:
        self.stored = weight

    def weight(self, layer: int) -> Tensor:
        return self.stored

    def device(self, layer: int) -> torch.device:
        return self.stored.device

    def d_in(self, layer: int) -> int:
        return self.stored.shape[1]


@pytest.mark.parametrize("relative_norm", [1e-3, 1e-2])
@pytest.mark.parametrize(("shape", "batches", "every"), [((96, 256), 500, 1), ((256, 512), 120, 3)])
def test_many_batches(shape: tuple[int, int], batches: int, every: int, relative_norm: float) -> None:
    """Two runs of the same updates, mostly of low rank, some dense: G carried, and everything from the weight.

    G is computed again at each dense update, every 20 batches, so the larger shape needs fewer.
    """
    carried_run, scratch_run = weight_of(*shape), weight_of(*shape)
    layer = _Layer(carried_run)
    kept: dict[int, GramMatrix] = {}
    start = float(hyperspherical_energy(carried_run.double()))
    start_by_gram = float(energy_from_gram(GramMatrix.of(carried_run).matrix, weight=carried_run))
    largest = 0.0
    for number in range(batches):
        grams = GramMatrices(layer, kept, [0])  # type: ignore[arg-type]
        update = update_of(scratch_run, relative_norm, seed=number)
        carried_space = sphere.PrincipalSpace.from_gram(layer.stored, grams[0], 0.5)
        scratch_space = sphere.PrincipalSpace.from_weight(scratch_run, 0.5)
        assert carried_space.rank == scratch_space.rank
        if number % 20 == 19:  # RECT's, or an executor's
            dense = update.dense() if number % 40 == 19 else rect(update.dense(), scratch_run, 0.4)
            changes = [carried_space.suppress(dense, 0.8), scratch_space.suppress(dense, 0.8)]
            grams.advance(0, changes[0])
        else:
            projected = LowRankUpdate(update.values, carried_space.suppress_keys(update.keys, 0.8))
            changes = [projected.dense(), update.values @ scratch_space.suppress_keys(update.keys, 0.8).T]
            grams.advance(0, projected)
        assert relative_error(*changes) < 1e-5
        layer.stored, scratch_run = layer.stored + changes[0], scratch_run + changes[1]
        kept = grams.carried
        if number % every == 0:
            change = float(hyperspherical_energy(scratch_run.double())) - start
            by_gram = float(energy_from_gram(grams[0], weight=layer.stored)) - start_by_gram
            # 1% down to changes of 1e-7 of HE: a hundredth of what editing does to it.
            assert abs(by_gram - change) <= 0.01 * max(abs(change), 1e-7 * start)
            largest = max(largest, abs(change) / start)
    assert largest > 5e-7  # well above where differences no longer count


def test_energy_by_a_float32_matrix() -> None:
    """Above 1024 rows G is float32; HE must still be right where it moves by 1e-6."""
    weight = weight_of(1100, 1200)
    gram = GramMatrix.of(weight)
    start, start_by_gram = float(hyperspherical_energy(weight.double())), float(energy_from_gram(gram.matrix))
    for number in range(8):
        update = update_of(weight, 3e-3, seed=number)
        advanced = gram.after(weight, update)
        assert advanced is not None
        gram, weight = advanced, weight + update.dense()
        change = float(hyperspherical_energy(weight.double())) - start
        by_gram = float(energy_from_gram(gram.matrix, weight=weight)) - start_by_gram
        assert abs(by_gram - change) <= 0.01 * max(abs(change), 1e-7 * start)


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics are generated once for all tests."""
    return tmp_path_factory.mktemp("grams")


@pytest.fixture
def make(folder: Path) -> MakeHparams:
    def hparams(base_alg: str = "MEMIT", **changes: Any) -> sphere.SPHEREHyperParams:
        return tiny_hparams(folder, **{"v_num_grad_steps": 3, "base_alg": base_alg, **changes})

    return hparams


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that a Gram matrix was computed from."""
    weights: list[Tensor] = []
    real = GramMatrix.of

    def noted(weight: Tensor) -> GramMatrix:
        weights.append(weight)
        return real(weight)

    monkeypatch.setattr(GramMatrix, "of", noted)
    return weights


def edit(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams,
         batches: Sequence[list[dict[str, str]]] = BATCHES, **kwargs: Any) -> sphere.EditSession:
    for batch in batches:
        sphere.apply_sphere_to_model(model, tok, batch, hparams, **kwargs)
    return sphere.EditSession.of(model)


def add_noise(model: nn.Module, _tok: Any, requests: Any, hparams: Any, **_: Any
              ) -> tuple[nn.Module, dict[str, Tensor]]:
    """An executor of EasyEdit's protocol."""
    generator = torch.Generator().manual_seed(len(str(requests)))
    for layer in hparams.layers:
        parameter = model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")
        with torch.no_grad():
            parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model, {}


class _Watch(sphere.EditCallback):
    """At every event, every G on offer is that of the weight; notes the energies of the weights themselves."""

    def __init__(self) -> None:
        self.energies: list[dict[int, float]] = []
        self.offered: set[tuple[int, ...]] = set()

    def _check(self, event: sphere.EditEvent) -> None:
        self.offered.add(tuple(event.grams))
        for layer, gram in event.grams.items():
            assert relative_error(gram, exact(event.weights[layer])) < 1e-6

    def on_batch_start(self, event: sphere.EditEvent) -> None:
        self._check(event)
        if not self.energies:
            self.on_batch_end(event)

    def on_batch_end(self, event: sphere.EditEvent) -> None:
        self._check(event)
        self.energies.append({layer: float(hyperspherical_energy(weight.double()))
                              for layer, weight in event.weights.items()})


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], torch.dtype, bool]] = {
    # settings, arguments, dtype, whether G is offered
    "AlphaEdit": ({"base_alg": "AlphaEdit"}, {}, torch.float32, True),
    "MEMIT": ({"base_alg": "MEMIT"}, {}, torch.float32, True),
    "MEMIT pretrained": ({"principal_space": "pretrained"}, {}, torch.float32, True),
    "MEMIT alone": ({"alpha": 0.0}, {}, torch.float32, True),
    "MEMIT bfloat16": ({"base_alg": "MEMIT"}, {}, torch.bfloat16, True),
    "RECT": ({"base_alg": "RECT"}, {}, torch.float32, True),
    "RECT alone": ({"base_alg": "RECT", "alpha": 0.0}, {}, torch.float32, False),
    "PRUNE": ({"base_alg": "PRUNE"}, {}, torch.float32, False),
    "executor": ({"projection_stage": "update"}, {"executor": add_noise}, torch.float32, True),
    "executor pretrained": ({"projection_stage": "update", "principal_space": "pretrained"}, {"executor": add_noise},
                            torch.float32, False),
}


@pytest.mark.parametrize("name", RUNS)
def test_tracked_energies(name: str, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    settings, arguments, dtype, offers = RUNS[name]
    model, tracker, watch = tiny_model("llama").to(dtype), sphere.HETracker(), _Watch()
    edit(model, tok, make(**settings), callbacks=[tracker, watch], **arguments)
    assert watch.offered == {LAYERS if offers else ()}
    for record, energies in zip(tracker.records, watch.energies, strict=True):
        for layer in LAYERS:
            change = energies[layer] / watch.energies[0][layer] - 1.0
            assert abs(record.relative_change[layer] - change) <= 0.01 * abs(change)


@pytest.mark.parametrize("name", ["AlphaEdit", "RECT", "executor", "MEMIT bfloat16"])
def test_a_run_by_carried_matrices_is_one_from_scratch(name: str, tok: PreTrainedTokenizerBase, make: MakeHparams,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    settings, arguments, dtype, _ = RUNS[name]
    model, scratch = tiny_model("llama").to(dtype), tiny_model("llama").to(dtype)
    hparams = make(**settings)
    before = [model.model.layers[layer].mlp.down_proj.weight.detach().clone() for layer in LAYERS]
    edit(model, tok, hparams, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(GramMatrices, "get", lambda self, layer: None)
        assert edit(scratch, tok, hparams, **arguments).grams == {}
    for layer, was in zip(LAYERS, before, strict=True):
        change, expected = (each.model.layers[layer].mlp.down_proj.weight.detach().float() - was.float()
                            for each in (model, scratch))
        assert relative_error(change, expected) < 1e-4


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize(("name", "products"), [
    ("AlphaEdit", 1), ("MEMIT", 1), ("RECT", 3), ("executor", 3), ("MEMIT bfloat16", 3)])
def test_products_of_full_width(name: str, products: int, tracked: bool, tok: PreTrainedTokenizerBase,
                                make: MakeHparams, computed: list[Tensor]) -> None:
    """One in all for updates of low rank, one a batch for others, shared by projection and tracker."""
    settings, arguments, dtype, _ = RUNS[name]
    edit(tiny_model("llama").to(dtype), tok, make(**settings), BATCHES[:3],
         callbacks=[sphere.HETracker()] if tracked else [], **arguments)
    after_the_last = tracked and products > 1
    assert len(computed) == len(LAYERS) * (products + after_the_last)


@pytest.mark.parametrize("name", ["MEMIT pretrained", "MEMIT alone", "RECT alone", "PRUNE", "executor pretrained"])
def test_none_without_use(name: str, tok: PreTrainedTokenizerBase, make: MakeHparams, computed: list[Tensor]) -> None:
    settings, arguments, _, _ = RUNS[name]
    session = edit(tiny_model("llama"), tok, make(**settings), BATCHES[:2], **arguments)
    assert session.grams == {}
    assert computed == []


def test_only_of_layers_that_are_asked_for(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    session = edit(tiny_model("llama"), tok, make(alpha=0.0), BATCHES[:3], callbacks=[sphere.HETracker(layers=[2])])
    assert [(layer, gram.advances) for layer, gram in session.grams.items()] == [(2, 3)]


def test_not_of_tall_weights(tok: PreTrainedTokenizerBase, folder: Path) -> None:
    hparams = tiny_hparams(folder / "tall", v_num_grad_steps=2, base_alg="MEMIT")
    tracker, watch = sphere.HETracker(), _Watch()
    session = edit(tiny_model("llama", intermediate_size=32), tok, hparams, BATCHES[:2], callbacks=[tracker, watch])
    assert session.grams == {}
    assert watch.offered == {()}
    assert len(tracker.records) == 3


def test_pretrained_space_is_found_once(tok: PreTrainedTokenizerBase, make: MakeHparams,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Later batches cost thin products alone: no product of the weight with itself, no eigenproblem."""
    model, hparams = tiny_model("llama"), make(principal_space="pretrained")
    edit(model, tok, hparams, BATCHES[:1])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a space was built again")

    monkeypatch.setattr(sphere.PrincipalSpace, "from_weight", refuse)
    monkeypatch.setattr(sphere.PrincipalSpace, "from_gram", refuse)
    monkeypatch.setattr(GramMatrix, "of", refuse)
    assert edit(model, tok, hparams, BATCHES[1:3]).num_batches == 3


# --- whose they are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("restored", [True, False])
def test_weights_changed_from_outside(restored: bool, tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    model, fresh, hparams = tiny_model("llama"), tiny_model("llama"), make()
    if not restored:
        for each in fresh.model.layers:
            each.mlp.down_proj.weight.data *= 1.001
    edit(model, tok, hparams, BATCHES[:2])
    model.load_state_dict(tiny_model("llama").state_dict() if restored else fresh.state_dict())
    session, expected = edit(model, tok, hparams, BATCHES[2:3]), edit(fresh, tok, hparams, BATCHES[2:3])
    for layer in LAYERS:
        assert session.grams[layer].advances == 1
        assert torch.equal(session.grams[layer].matrix, expected.grams[layer].matrix)


def test_settings_that_need_none_drop_them(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    """Another batch in between changes the weights without carrying G along."""
    model, hparams = tiny_model("llama"), make(projection_stage="update")
    assert edit(model, tok, hparams, BATCHES[:1]).grams.keys() == set(LAYERS)
    assert edit(model, tok, make(projection_stage="update", alpha=0.0), BATCHES[1:2], executor=add_noise).grams == {}
    edit(model, tok, hparams, BATCHES[2:3], callbacks=[_Watch()])
    assert sphere.EditSession.of(model).num_batches == 3


def test_undone_batch(tok: PreTrainedTokenizerBase, make: MakeHparams) -> None:
    class Refusing(sphere.EditCallback):
        def on_batch_end(self, event: sphere.EditEvent) -> None:
            raise RuntimeError("refused")

    model, hparams = tiny_model("llama"), make()
    kept = dict(edit(model, tok, hparams, BATCHES[:1]).grams)
    with pytest.raises(RuntimeError, match="refused"):
        edit(model, tok, hparams, BATCHES[1:2], callbacks=[Refusing()])
    grams = sphere.EditSession.of(model).grams
    assert all(grams[layer] is gram for layer, gram in kept.items())
    edit(model, tok, hparams, BATCHES[1:2], callbacks=[_Watch()])


def test_not_saved(tok: PreTrainedTokenizerBase, make: MakeHparams, tmp_path: Path) -> None:
    model, hparams = tiny_model("llama"), make()
    edit(model, tok, hparams, BATCHES[:1]).save(tmp_path / "session.safetensors")
    session = sphere.EditSession.load(tmp_path / "session.safetensors")
    assert session.grams == {}
    edit(model, tok, hparams, BATCHES[1:2], session=session, callbacks=[_Watch()])
    assert session.num_batches == 2
    assert session.grams.keys() == set(LAYERS)


def test_matrices_on_another_device_are_dropped() -> None:
    weight = weight_of(20, 30)
    elsewhere = SimpleNamespace(matrix=torch.empty(20, 20, device="meta"))
    grams = GramMatrices(_Layer(weight), {0: elsewhere}, [0])  # type: ignore[arg-type, dict-item]
    assert grams.carried == {}
    assert relative_error(grams[0], exact(weight)) < 1e-12
    with pytest.raises(KeyError):
        grams[1]


# --- the tracker --------------------------------------------------------------------------------------------


def test_tracker_takes_the_matrix_it_is_given() -> None:
    weights = {layer: weight_of(20, 30, seed=layer) for layer in LAYERS}
    other = exact(weight_of(20, 30, seed=7))
    tracker = sphere.HETracker()
    tracker.on_batch_start(sphere.EditEvent(nn.Identity(), weights, 0, 0, [], grams={2: other}))
    energies = tracker.records[0].energy
    assert energies[1] == float(hyperspherical_energy(weights[1]))
    assert energies[2] == float(energy_from_gram(other, weight=weights[2]))
    assert energies[2] != pytest.approx(float(hyperspherical_energy(weights[2])), rel=1e-6)
