"""In-context editing: examples to put in front of a prompt; no weight changes and none is returned."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class IKEHyperParams:
    alg_name: str
    model_name: str
    device: int
    model_parallel: bool = False


def apply_ike_to_model(model, tok, request: dict, hparams: IKEHyperParams, copy=False, return_orig_weights=False,
                       keep_original_weight=False, train_ds=None, **kwargs):
    return [f"New Fact: {request[0]['prompt']} {request[0]['target_new']}"]
