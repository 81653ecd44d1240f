"""Loading, editing a chunk of requests a call, metrics before and after, and weights put back."""

from time import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..util.alg_dict import ALG_DICT
from ..util.common import parameter, torch_device
from .batch_editor import BatchEditor

_PADDED_RIGHT = ("ROME", "MEMIT", "EMMET", "AlphaEdit", "SPHERE")


class BaseEditor:
    @classmethod
    def from_hparams(cls, hparams):
        return cls(hparams)

    def __init__(self, hparams):
        self.model_name, self.alg_name, self.hparams = hparams.model_name, hparams.alg_name, hparams
        self.apply_algo = ALG_DICT[self.alg_name]
        if isinstance(self.model_name, str):
            if not any(family in self.model_name.lower() for family in ("gpt", "llama", "qwen2", "mistral")):
                raise NotImplementedError
            side = "right" if self.alg_name in _PADDED_RIGHT else "left"
            pair = (AutoModelForCausalLM.from_pretrained(self.model_name).float(),
                    AutoTokenizer.from_pretrained(self.model_name, padding_side=side))
            pair[1].pad_token = pair[1].eos_token
        else:
            pair = self.model_name
        self.model, self.tok = pair
        if not hparams.model_parallel:
            self.model.to(torch_device(hparams))

    def edit(self, prompts, target_new, rephrase_prompts=None, locality_inputs=None, sequential_edit=False,
             verbose=True, **kwargs):
        if hasattr(self.hparams, "batch_size"):
            assert self.hparams.batch_size == 1, "one request a call: batch_size must be 1"
        requests = self._requests(prompts, target_new, rephrase_prompts, locality_inputs, **kwargs)
        metrics = [{"pre": self._quality(self.model, request)} for request in requests]
        for i, (request, metric) in enumerate(zip(requests, metrics, strict=True)):
            found = self.apply_algo(self.model, self.tok, [request], self.hparams, copy=False, return_orig_weights=True,
                                    keep_original_weight=False, train_ds=None)
            edited, originals = (self.model, {}) if self.alg_name == "IKE" else found  # IKE returns examples
            self._finish([metric], [request], edited, sequential_edit, originals)
            metric["case_id"] = i
        return metrics, edited, originals

    def batch_edit(self, prompts, target_new, rephrase_prompts=None, locality_inputs=None, sequential_edit=False,
                   verbose=True, **kwargs):
        assert BatchEditor.is_batchable_method(self.alg_name), f"{self.alg_name} edits one by one"
        requests, metrics = self._requests(prompts, target_new, rephrase_prompts, locality_inputs, **kwargs), []
        for start in range(0, len(requests), self.hparams.batch_size):
            chunk = requests[start:start + self.hparams.batch_size]
            found = [{"pre": self._quality(self.model, request)} for request in chunk]
            began = time()
            edited, originals = self.apply_algo(self.model, self.tok, chunk, self.hparams, copy=False,
                                                return_orig_weights=True)
            found = [{**metric, "case_id": i, "time": time() - began} for i, metric in enumerate(found)]
            self._finish(found, chunk, edited, sequential_edit, originals)
            metrics += found
        return metrics, edited, originals

    @staticmethod
    def _requests(prompts, targets, rephrased, locality, subject):
        requests = []
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            assert subject[i] in prompt
            kept = {key: {name: texts[i] for name, texts in given.items()} for key, given in (locality or {}).items()}
            requests.append({"prompt": prompt, "target_new": target, "ground_truth": None, "portability": {},
                             "locality": kept, "subject": subject[i],
                             **({} if rephrased is None else {"rephrase_prompt": rephrased[i]})})
        return requests

    def _finish(self, metrics, requests, edited, sequential_edit, originals):
        for metric, request in zip(metrics, requests, strict=True):
            metric.update({"requested_rewrite": request, "post": self._quality(edited, request)})
            for key in request["locality"]:
                before, after = (metric[when]["locality"][f"{key}_output"][0] for when in ("pre", "post"))
                metric["post"]["locality"][f"{key}_acc"] = _share_equal(before, after)
        if sequential_edit:
            self.model = edited
            return
        with torch.no_grad():
            for name, weight in originals.items():
                parameter(self.model, name)[...] = weight

    def _quality(self, model, request):
        quality = {"locality": {}, "portability": {}}
        for name, key in (("rewrite_acc", "prompt"), ("rephrase_acc", "rephrase_prompt")):
            if key in request:
                quality[name] = _share_equal(*self._continuation(model, request[key], request["target_new"]))
        for key, texts in request["locality"].items():
            said, _ = self._continuation(model, texts["prompt"], texts["ground_truth"])
            quality["locality"][f"{key}_output"] = [said]
        return quality

    @torch.no_grad()
    def _continuation(self, model, prompt, target):
        """Tokens that the model finds likeliest where the target stands, and the target's."""
        ids, start = self.tok.encode(f"{prompt} {target}"), len(self.tok.encode(prompt))
        logits = model(torch.tensor([ids], device=torch_device(self.hparams))).logits[0]
        return logits[start - 1:-1].argmax(-1).tolist(), ids[start:]


def _share_equal(said, meant):
    return [sum(a == b for a, b in zip(said, meant, strict=True)) / len(meant)]
