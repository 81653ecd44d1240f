"""Writes the texts that ship with the package (sphere_easyedit/data/texts, see methods/shipped_texts.py).

The model of each hyperparameter file samples them itself, as it does in a run whose statistics are `generated`, so
they hold nothing that anyone else wrote. For SmolLM2-135M (Apache 2.0):

    python benchmarks/ship_texts.py AlphaEdit/smollm2-135m
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import machine
from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.methods.corpus import GENERATED, text_length, token_sequences
from sphere_easyedit.methods.shipped_texts import FOLDER, write_texts
from sphere_easyedit.methods.statistics_fingerprint import StatisticsFingerprints
from sphere_easyedit.models.architecture import frozen
from sphere_easyedit.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hparams", nargs="+", help="hyperparameter files whose mom2_dataset is `generated`")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    print(machine())
    for name in options.hparams:
        hparams = SPHEREHyperParams.from_hparams(name)
        if hparams.mom2_dataset != GENERATED:
            raise SystemExit(f"mom2_dataset of {name} is {hparams.mom2_dataset!r}: give a file with {GENERATED!r}")
        model, tok = load_model(hparams.model_name, hparams.device)
        editable = hparams.editable(model)
        started = time.perf_counter()
        with frozen(model):
            sequences = token_sequences(editable, tok, hparams, text_length(editable, hparams))
        seconds, tokens = time.perf_counter() - started, sum(map(len, sequences))
        origin = StatisticsFingerprints(editable, hparams, tok).text_origin()
        path = write_texts(Path(hparams.model_name).name, origin, sequences, options.folder)
        print(f"{path}: {len(sequences)} texts, {tokens} tokens, {path.stat().st_size} bytes; "
              f"{seconds:.1f} s, {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
