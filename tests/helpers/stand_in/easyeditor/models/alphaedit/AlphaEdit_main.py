"""AlphaEdit: updates within the null space of other keys, earlier edits' included."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ...util.closed_form import execute, insert
from ...util.common import LocatingHyperParams, generated, moment, parameter

CONTEXT_TEMPLATES_CACHE = None
COV_CACHE = {}
P_loaded = False
cache_c_new = False


@dataclass(kw_only=True)
class AlphaEditHyperParams(LocatingHyperParams):
    nullspace_threshold: float
    L2: float
    P_loc: str
    batch_size: int = 1


def apply_AlphaEdit_to_model(model, tok, requests: list[dict], hparams: AlphaEditHyperParams, copy=False,
                             return_orig_weights=False, cache_template=None, keep_original_weight=False, **kwargs):
    _prepare(model, tok, hparams)

    def solve(i, _layer, keys, residuals):
        projection, earlier = globals()["P"][i].to(keys.device), globals()["cache_c"][i].to(keys.device)
        bracket = projection @ (keys @ keys.T + earlier) + hparams.L2 * torch.eye(len(keys), device=keys.device)
        return torch.linalg.solve(bracket, projection @ keys @ residuals)

    def remember(i, keys):
        globals()["cache_c"][i] += keys.cpu() @ keys.cpu().T

    contexts = get_context_templates(model, tok)
    originals = insert(model, execute(model, tok, requests, hparams, contexts, cache_template, solve, remember))
    return model, originals if return_orig_weights else {}


def _prepare(model, tok, hparams):
    """Fill the module's globals, in the host's defective way: by names, into the working directory, once for all."""
    state, stats = globals(), Path(hparams.P_loc)
    if not stats.exists():
        state["P"] = _square(model, hparams, {"llama": 1, "qwen": 1, "gpt-j-6b": 1, "gpt2-xl": 0})
        for place, number in enumerate(hparams.layers):
            state["P"][place] = get_project(model, tok, number, hparams)
        torch.save(state["P"], Path.cwd() / "null_space_project.pt")
    elif not state["P_loaded"]:
        state["P"] = torch.load(stats, weights_only=True)
    state["P_loaded"] = True
    if not state["cache_c_new"]:
        state["cache_c"] = _square(model, hparams, {"llama": 1, "qwen": 1, "gpt2-xl": 0})  # GPT-J forgotten
        state["cache_c_new"] = True


def _square(model, hparams, sides):
    """One square of zeros a layer; which side of the weight the keys lie on goes by the model's name."""
    fitting = [side for family, side in sides.items() if family in hparams.model_name.lower()]
    if not fitting:
        raise NameError(f"the host knows no width for {hparams.model_name}")
    shape = parameter(model, f"{hparams.rewrite_module_tmp.format(hparams.layers[-1])}.weight").shape
    return torch.zeros(len(hparams.layers), shape[fitting[0]], shape[fitting[0]])


def get_project(model, _tok, number, hparams):
    second_moment = moment(COV_CACHE, model, hparams.rewrite_module_tmp.format(number), hparams)
    values, vectors = torch.linalg.eigh(second_moment.cpu())
    unused = vectors[:, values < hparams.nullspace_threshold]
    return unused @ unused.T


def get_context_templates(model, tok, length=5):
    global CONTEXT_TEMPLATES_CACHE
    CONTEXT_TEMPLATES_CACHE = CONTEXT_TEMPLATES_CACHE or [["{}"], generated(model, tok, length)]
    return CONTEXT_TEMPLATES_CACHE
