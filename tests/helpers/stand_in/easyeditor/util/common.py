"""Look-ups, target values and statistics, as every method of this host shares them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(kw_only=True)
class HyperParams:
    alg_name: str
    model_name: str
    device: int
    layers: list[int]
    rewrite_module_tmp: str
    layer_module_tmp: str
    mlp_module_tmp: str
    attn_module_tmp: str
    ln_f_module: str
    lm_head_module: str
    model_parallel: bool = False


@dataclass(kw_only=True)
class LocatingHyperParams(HyperParams):
    fact_token: str
    v_num_grad_steps: int
    v_lr: float
    v_loss_layer: int
    v_weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    mom2_adjustment: bool
    mom2_dataset: str
    mom2_n_samples: int
    mom2_dtype: str
    stats_dir: str


def torch_device(hparams):
    """A number is a GPU's, be there one or not."""
    return torch.device(f"cuda:{hparams.device}" if isinstance(hparams.device, int) else hparams.device or "cpu")


def rows_of(tok, texts, device):
    """Texts in tokens, padded on whatever side the tokenizer pads."""
    return tok(texts, padding=True, return_tensors="pt", return_token_type_ids=False).to(device)


def parameter(model, name):
    for found, value in model.named_parameters():  # which lists a tied weight once, under its first name
        if found == name:
            return value
    raise LookupError(name)


def fitting(update, shape):
    if shape not in (update.shape, update.T.shape):
        raise ValueError("Update matrix does not match original weight shape.")
    return update if update.shape == shape else update.T


def prepared(request):
    """The subject's place marked in the prompt, and a space before the target."""
    assert "{}" in request["prompt"] or request["subject"] in request["prompt"]
    return {**request, "prompt": request["prompt"].replace(request["subject"], "{}"),
            "target_new": " " + request["target_new"].lstrip()}


def subject_ends(tok, templates, subjects):
    """Index of each subject's last token, counted from the front: padding on the left makes it wrong."""
    return [len(tok.encode(template.split("{}")[0] + subject)) - 1
            for template, subject in zip(templates, subjects, strict=True)]


@torch.no_grad()
def states(model, tok, templates, subjects, module, side):
    """A module's inputs ("in") or outputs ("out") at the subjects' last tokens, ``(n, width)``."""
    texts = [template.format(subject) for template, subject in zip(templates, subjects, strict=True)]
    rows = rows_of(tok, texts, next(model.parameters()).device)
    seen = []

    def look(_module, args, out):
        seen.append(args[0] if side == "in" else out[0] if isinstance(out, tuple) else out)

    handle = model.get_submodule(module).register_forward_hook(look)
    try:
        model(**rows)
    finally:
        handle.remove()
    return seen[0][range(len(texts)), subject_ends(tok, templates, subjects)]


def compute_z(model, tok, request, hparams, module, contexts):
    """What a module must put out at the subject's last token for the model to say the target."""
    head = parameter(model, f"{hparams.lm_head_module}.weight")
    norm = model.get_submodule(hparams.ln_f_module)
    model.requires_grad_(False)  # and so it stays
    target = tok.encode(request["target_new"], add_special_tokens=False)
    templates = [context.format(request["prompt"]) + tok.decode(target[:-1]) for context in contexts]
    rows = rows_of(tok, [template.format(request["subject"]) for template in templates], torch_device(hparams))
    at = subject_ends(tok, templates, [request["subject"]] * len(templates))
    ends = rows["attention_mask"].sum(1)
    delta = torch.zeros(head.shape[1], device=head.device, requires_grad=True)
    first, last = [], []

    def add(_module, _args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        first.append(hidden[0, at[0]].detach().clone())
        hidden[range(len(at)), at] += delta
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    loss_layer = model.get_submodule(hparams.layer_module_tmp.format(hparams.v_loss_layer))
    handles = [model.get_submodule(module).register_forward_hook(add), loss_layer.register_forward_hook(
        lambda _module, _args, out: last.append(out[0] if isinstance(out, tuple) else out))]
    adam = torch.optim.Adam([delta], lr=hparams.v_lr)
    try:
        for step in range(hparams.v_num_grad_steps):
            model(**rows)
            says = torch.log_softmax(norm(last.pop()) @ head.T, dim=-1)
            loss = torch.stack([-says[row, end - len(target) + i, token] for row, end in enumerate(ends)
                                for i, token in enumerate(target)]).mean()
            if loss < 0.05 or step == hparams.v_num_grad_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            delta.data *= (hparams.clamp_norm_factor * first[0].norm() / delta.data.norm()).clamp(max=1)
    finally:
        for handle in handles:
            handle.remove()
    return (first[0] + delta).detach()


def moment(cache, model, module, hparams):
    """Second moment of a module's inputs, remembered by the model's name: two of one name share it."""
    key = (model.config._name_or_path.replace("/", "_"), module)
    if key not in cache:
        folder = Path(hparams.stats_dir) / model.config._name_or_path.rsplit("/")[-1]
        name = f"{module}_{hparams.mom2_dtype}_mom2_{hparams.mom2_n_samples}.npz"
        with np.load(folder / f"{hparams.mom2_dataset}_stats" / name) as stored:
            cache[key] = (torch.from_numpy(stored["mom2.mom2"]) / int(stored["mom2.count"])).float()
    return cache[key].to(torch_device(hparams))


@torch.no_grad()
def generated(model, tok, length):
    """What the model at hand goes on to say; without braces, which would take the prompt's place."""
    texts = []
    for opening in ("The", "Therefore"):
        rows = rows_of(tok, [opening], next(model.parameters()).device)
        ids = model.generate(**rows, max_new_tokens=length, do_sample=False, pad_token_id=tok.eos_token_id)
        texts.append(tok.decode(ids[0]).replace("{", " ").replace("}", " ") + ". {}")
    return texts
