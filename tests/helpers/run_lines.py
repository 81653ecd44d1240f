"""Lines of run files, as runs write them."""

from __future__ import annotations

SETTINGS = {
    "model_name": "tiny", "layers": [1, 2], "base_alg": "AlphaEdit", "alpha": 0.5, "gamma": 0.5, "device": "cpu",
    "v_num_grad_steps": 12, "v_lr": 0.5, "v_loss_layer": 3, "v_weight_decay": 0.001, "clamp_norm_factor": 4.0,
    "kl_factor": 0.0625, "L2": 0.1, "mom2_update_weight": 20.0, "nullspace_share": 0.6, "mom2_dataset": "generated",
    "context_templates": ["He said that. {}"], "executor": "native", "rewrite_module_tmp": "a.{}", "layer_module_tmp":
    "b.{}", "mlp_module_tmp": "c.{}", "attn_module_tmp": "d.{}", "ln_f_module": "e", "lm_head_module": "f"}

METRICS_LINE = {"num_edits": 2, "when": "after", "protocol": "paper", "seconds": 1.0, "efficacy": {
    "mean": 50.0, "ci95": [40.0, 60.0], "n": 2}, "watched": {"perplexity": 30.0, "update_norms": {"1": 0.5}}}

ABILITIES_LINE = {"num_edits": 2, "when": "after", "protocol": "lm-eval", "seconds": 1.0, "abilities": {
    "gsm8k": {"mean": 5.0, "stderr": 0.1, "n": 2}}}

EDITS_LINE = {"num_edits": 2, "case_ids": [1, "two"], "seconds": {"solve": 0.5}, "losses": [1.0, 2.0],
              "wall_seconds": 1.0, "update_norms": {"1": 0.5}, "energy": {"1": 3.5}, "efficacy": 50.0}

CASES_LINE = {"case_id": 1, "prompt": "Rome is in", "subject": "Rome", "target_new": "France", "target_true": "Italy",
              "pre": {"efficacy": 0.0}, "post": {"efficacy": 1.0}, "generations": {"before": "a", "after": "b"}}

CONFIG = {"run": {"dataset": "demo", "seed": 0, "num_edits": 2, "measure": {"protocols": ["paper"]}},
          "hparams": SETTINGS | {"layers": [1]}, "versions": {"python": "3"}}

SUMMARY = {"protocol": "paper", "num_edits": 2, "pre": None, "post": {"efficacy": {"mean": 50.0, "ci95": None, "n": 2}},
           "editing_seconds": 1.0, "evaluation_seconds": 1.0, "peak_memory_bytes": 5}

ENERGY = "num_edits,layer,energy,relative_change\n0,1,100.0,0.0\n2,1,101.0,0.01\n"
