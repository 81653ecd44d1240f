"""Editing a tiny model of each architecture, held against plain forward passes; and the table of it in the docs.

    python tests/helpers/architecture_trials.py > docs/MODELS.md
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.architectures import ARCHITECTURES, tiny_architecture
from helpers.paths import TESTS
from sphere_easyedit.editing.session import EditSession
from sphere_easyedit.hparams_files import starting_hparams
from sphere_easyedit.models.output_path import Gated, Normalised, OutputPath, Scaled

TOKENIZER = TESTS / "golden" / "llama" / "tiny-llama"
# The subject's one token is all of the first prompt, so its loss is that of a plain forward pass. In the second, other
# tokens follow, whose keys the edit moves, too; the optimiser knows nothing of that, so it is taken out of the pass.
FACTS = ({"prompt": "{}", "subject": "I", "target_new": "of"},
         {"prompt": "In a city {} plays for", "subject": "John Smith", "target_new": "the United States"})
# Largest difference between the loss that the optimiser reported and the plain forward pass's, in nats.
TOLERANCE = 1e-5
WORDS = ("the", "history", "of", "city", "began", "in", "north", "river", "found", "named", "by", "those", "who",
         "came", "from", "coast", "with", "ships", "and", "songs", "war", "peace", "when", "a", "was", "their")


@dataclass(frozen=True)
class Trial:
    """What editing two facts into a tiny model did.

    Attributes:
        module: of the weights that were edited; empty where the model was refused before one was chosen.
        path: how their output reaches the residual stream, in words.
        before, after, reported: loss (nats a token) of each fact's target: unedited, edited, by the optimiser.
        refusal: the error's text; None where the model was edited.
        untouched: no weight differs from what it was.
    """

    module: str
    path: str = ""
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    reported: tuple[float, ...] = ()
    refusal: str | None = None
    untouched: bool = False


class _Losses(sphere.EditCallback):
    def on_batch_end(self, event: Any) -> None:
        self.losses = tuple(event.losses)


def try_edit(label: str, model: nn.Module | None = None, layers: Sequence[int] | None = None) -> Trial:
    """Edit ``FACTS`` into the tiny model of an architecture, one layer, MEMIT next to without a ridge and no SPHERE.

    Args:
        label: one of ``ARCHITECTURES``.
        model: instead of the one that ``tiny_architecture`` makes.
        layers: to be edited; None for the second of those that ``starting_hparams`` proposes, or the only one.
    """
    model = tiny_architecture(label) if model is None else model
    tok = AutoTokenizer.from_pretrained(TOKENIZER)
    unedited = {name: value.clone() for name, value in model.state_dict().items()}
    module = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            start = starting_hparams(model.config, "tiny", "MEMIT")
            chosen = list(layers or start["layers"][-1:])
            module = start["rewrite_module_tmp"].format(chosen[-1])
            hparams = _hparams(start, chosen, Path(folder))
            before = tuple(_loss(model, tok, fact) for fact in FACTS)
            session, noted = EditSession(), _Losses()
            sphere.apply_sphere_to_model(model, tok, FACTS, hparams, session=session, callbacks=[noted])
        except ValueError as error:
            untouched = all(torch.equal(value, unedited[name]) for name, value in model.state_dict().items())
            return Trial(module, refusal=str(error), untouched=untouched)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, unedited[name])]
    assert changed == [f"{module}.weight"]
    first = _loss(model, tok, FACTS[0])
    with _edited_at_the_subject_alone(model, tok, module, unedited[f"{module}.weight"]):
        second = _loss(model, tok, FACTS[1])
    return Trial(module, _described(session.paths[chosen[-1]]), before, (first, second), noted.losses)


def _hparams(start: dict[str, Any], layers: list[int], folder: Path) -> sphere.SPHEREHyperParams:
    text = folder / "text.txt"
    generator = torch.Generator().manual_seed(0)
    text.write_text("\n".join(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (30,), generator=generator).tolist())
                              for _ in range(40)), encoding="utf-8")
    return sphere.SPHEREHyperParams.from_dict({
        **start, "layers": layers, "alpha": 0.0, "v_num_grad_steps": 15, "v_weight_decay": 0.0, "kl_factor": 0.0,
        "mom2_update_weight": 1e-6, "mom2_dataset": str(text), "mom2_n_samples": 40, "mom2_max_length": 40,
        "stats_dir": str(folder), "context_templates": [], "device": "cpu"})


def _prompt(fact: dict[str, str]) -> str:
    return fact["prompt"].format(fact["subject"])


@torch.no_grad()
def _loss(model: nn.Module, tok: PreTrainedTokenizerBase, fact: dict[str, str]) -> float:
    """Mean loss of the target's tokens behind the prompt, by one plain forward pass on one row."""
    prompt, whole = (tok(text)["input_ids"] for text in (_prompt(fact), f"{_prompt(fact)} {fact['target_new']}"))
    log_probs = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(dim=-1)
    return -sum(float(log_probs[i - 1, whole[i]]) for i in range(len(prompt), len(whole))) / (len(whole) - len(prompt))


@contextmanager
def _edited_at_the_subject_alone(model: nn.Module, tok: PreTrainedTokenizerBase, module: str, unedited: Tensor
                                 ) -> Iterator[None]:
    """Let the edited module act as edited at the subject's last token in ``FACTS[1]`` only, as unedited elsewhere."""
    upto = _prompt(FACTS[1]).index(FACTS[1]["subject"]) + len(FACTS[1]["subject"])
    lookup = len(tok(_prompt(FACTS[1])[:upto])["input_ids"]) - 1
    edited = model.get_submodule(module)
    change = edited.weight.detach() - unedited
    change = change if isinstance(edited, transformers.pytorch_utils.Conv1D) else change.T  # (d_in, d_out)

    def undo(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        added = (args[0] @ change).reshape(-1, output.shape[-1])
        added[lookup] = 0.0
        return output - added.reshape(output.shape)

    handle = edited.register_forward_hook(undo)
    try:
        yield
    finally:
        handle.remove()


def _described(path: OutputPath) -> str:
    if isinstance(path, Normalised):
        return f"{'layer' if path.centred else 'RMS'} norm `{path.module}`"
    if isinstance(path, Gated):
        return "gate by token"
    assert isinstance(path, Scaled)
    if path.factor is None:
        return "straight"
    return f"times {float(path.factor):.3g}" if len(path.factor) == 1 else "a factor a channel"


def _row(label: str, trial: Trial) -> str:
    if trial.refusal is not None:
        return f"| {label} | {f'`{trial.module}`' if trial.module else ''} | refused: {trial.refusal} | | |"
    off = max(abs(after - reported) for after, reported in zip(trial.after, trial.reported, strict=True))
    before, after = (", ".join(f"{loss:.2f}" for loss in losses) for losses in (trial.before, trial.after))
    return f"| {label} | `{trial.module}` | {trial.path} | {before} -> {after} | {off:.0e} |"


HEADER = """\
# Architectures tried

Each is built tiny from its config (`tests/helpers/architectures.py`: 4 to 6 blocks, random weights, transformers
{version}), and two facts are edited into one layer at once, by MEMIT next to without a ridge. An edit is right when
each target's loss, taken by a plain forward pass, is what the optimiser reported: with `I` -> `of` the edited model's
own; with `In a city John Smith plays for` -> `the United States` the edit is taken out but at the subject's last token.
Differences above {tolerance} nats fail. What is refused is refused with this line, and no weight is touched.

`PYTHONPATH=tests python -m helpers.architecture_trials > docs/MODELS.md` writes this page;
`tests/slow/test_architectures.py` compares it with what it finds. The random weights of a tiny model say that edits do
what they should, not how well a real one of that architecture takes edits. Edited for real here: SmolLM2-135M (Llama)
and Gemma-3-270M.

| architecture | edited weight | its output's way to the residual stream | loss before -> after | off by |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Write the page to standard output."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("sphere_easyedit").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = [_row(label, try_edit(label)) for label in ARCHITECTURES]
    sys.stdout.write(HEADER.format(version=transformers.__version__, tolerance=TOLERANCE) + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
