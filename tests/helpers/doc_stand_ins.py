"""What stands in for models, data and runs where the documentation's blocks are run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import sphere_easyedit as sphere
from helpers.models import save_tiny_model
from helpers.processes import call_cli
from sphere_easyedit.datasets.demo import demo_records

_CASES = (3928, 117, 5, 6, 7, 8, 9, 10)
# Options that count facts, edits or tokens, and the most that a tiny model is asked for.
_MOST = {"--num-edits": 4, "--batch-size": 2, "--skip": 1, "--eval-cases": 3, "--eval-every": 2, "--eval-sample": 2,
         "--text-tokens": 256, "--keep-weights-every": 2, "--rank": 4, "--fluency-tokens": 6, "--at": 4,
         "--max-new-tokens": 6}
# Models that the documentation names; each is the same tiny Llama here. The first is what short names become.
MODELS = ("models/tiny-llama", "path/to/model", "gemma", "HuggingFaceTB/SmolLM2-360M")
_READERS = ("evaluate", "show", "report", "export", "remove")  # commands whose first words are run directories
_MODULES = ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module",
            "lm_head_module")
_TEXT = "They say of {0} that the river runs to the sea there, and that the sea near {0} is wide."


class StandIns:
    """A folder with tiny models, data and a run.

    Attributes:
        data: what the variable ``SPHERE_DATA`` names.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = folder / MODELS[0]
        self._model.mkdir(parents=True)
        save_tiny_model(self._model, "llama")
        self.data = folder / "data"
        self.data.mkdir()
        for name in ("wikitext_test.txt", "wikitext_train.txt"):
            paragraphs = [_TEXT.format(record.target_new) for record in demo_records()[:len(_CASES)]]
            (self.data / name).write_text("\n\n".join(paragraphs))
        (self.data / "counterfact.json").write_text(json.dumps(_counterfact()))
        self._run: Path | None = None

    def furnish(self, workplace: Path) -> None:
        """Put models and data into the folder in which a page's blocks run."""
        for name in MODELS:
            (workplace / name).parent.mkdir(parents=True, exist_ok=True)
            (workplace / name).symlink_to(self._model)
        for file in self.data.iterdir():
            (workplace / file.name).symlink_to(file)
        (workplace / "DATA").symlink_to(self.data)

    def hparams(self, read: sphere.SPHEREHyperParams) -> sphere.SPHEREHyperParams:
        """Those of a shipped file, for the tiny model and with little work."""
        return sphere.SPHEREHyperParams.from_dict({
            **read.to_dict(), "model_name": str(self._model), "layers": [1, 2], "v_loss_layer": 3,
            "v_num_grad_steps": 2, "mom2_dataset": "generated", "mom2_n_samples": 12, "mom2_max_length": 24,
            "stats_dir": str(self._folder / "stats"), "P_loc": None, "nullspace_share": 0.6,
            "context_templates": ["He said that. {}"], "device": "cpu", **dict.fromkeys(_MODULES)})

    def arguments(self, words: Sequence[str], workplace: Path) -> list[str]:
        """A command's words with few edits of the tiny model; run directories that it reads are made."""
        changed = [str(self._model) if word == "smollm2-135m" else word for word in words if word != "..."]
        for place, word in enumerate(changed[:-1]):
            if word in _MOST and changed[place + 1].isdigit():
                changed[place + 1] = str(min(int(changed[place + 1]), _MOST[word]))
        if changed[0] == "edit":
            if "--num-edits" not in changed and "facts" not in changed:
                changed += ["--num-edits", "4"]
            if "--resume" not in changed and "--output" in changed:
                shutil.rmtree(workplace / changed[changed.index("--output") + 1], ignore_errors=True)
        if changed[0] == "report":
            changed.append("--no-figures")
        if changed[0] in _READERS:
            for word in changed[1:]:
                if word.startswith("-"):
                    break
                if not (workplace / word).exists():
                    shutil.copytree(self.run(workplace), workplace / word)
        return changed

    def run(self, workplace: Path) -> Path:
        """A run of four edits that kept all that commands may ask of it; made when first needed."""
        if self._run is None:
            done = call_cli("edit", "--hparams", "AlphaEdit/smollm2-135m", "--dataset", "counterfact", "--data",
                            "counterfact.json", "--num-edits", "4", "--batch-size", "2", "--eval-every", "2",
                            "--keep-factors", "--keep-weights-every", "2", "--keep-checkpoints", "0", "--text",
                            "wikitext_test.txt", "--text-tokens", "256", "--output", str(self._folder / "run"),
                            cwd=workplace)
            assert done.returncode == 0, done.stderr
            self._run = self._folder / "run"
        return self._run


def small_settings(read: Callable[[str], sphere.SPHEREHyperParams], stand_ins: StandIns
                   ) -> Callable[[str], sphere.SPHEREHyperParams]:
    """``SPHEREHyperParams.from_hparams`` that reads and checks the file that is named, and then makes it small."""
    return lambda name: stand_ins.hparams(read(name))


def _counterfact() -> list[dict[str, object]]:
    """Demonstration facts as records of CounterFact's file."""
    return [{"case_id": case, "requested_rewrite": {
        "prompt": record.prompt, "subject": record.subject, "target_new": {"str": record.target_new},
        "target_true": {"str": record.target_true}},
        "paraphrase_prompts": list(record.paraphrase_prompts),
        "neighborhood_prompts": [prompt.text for prompt in record.neighborhood_prompts],
        "generation_prompts": list(record.generation_prompts)}
        for case, record in zip(_CASES, demo_records(), strict=False)]
