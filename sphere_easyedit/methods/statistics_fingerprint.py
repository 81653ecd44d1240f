"""Fingerprints of statistics files: records, beside each file, of what it was collected from.

EasyEdit's paths name a model and a text by the last component of their own paths, so two models may share a path. The
fingerprint ``..._origin.json`` therefore holds digests of the weights that the layer's keys depend on, of the text and
of the tokenizer, the model's config, and the settings that the path does not contain.

File and fingerprint stay consistent if a process is killed: the fingerprint contains checksums of its file, the old
file is removed before the new fingerprint is written, and the new file is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..models.architecture import EditableModel
from ..models.fingerprint import tensor_digests
from ..models.offload import distinct_names, persistent_buffers
from ..utils.files import atomic_write, sha256_of
from .corpus import GENERATED_LENGTH, text_length, text_source

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams

logger = logging.getLogger(__name__)

_FORMAT = "sphere-easyedit statistics 1"
# Config fields that keys do not depend on, besides token ids and private fields. Digests cover the weights' dtype.
_IGNORED_FIELDS = frozenset({"architectures", "attn_implementation", "dtype", "quantization_config",
                          "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"})
_TOKENIZER_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs. ",
    "  Don't STOP\tnow,\n\nit's 2,048.5% done: (x_1 != y) {z}",
    "Über façade naïve — “Ελλάδα” Москва 東京 서울 عربى हिन्दी 🙂",
)
_NUM_PROBED_TOKENS = 2000  # of the vocabulary


@dataclass(frozen=True)
class StatisticsFile:
    """A statistics file and the content it had when it was checked.

    Attributes:
        path: the file.
        contents: its checksums (see ``array_checksums``).
    """

    path: Path
    contents: str | None


@contextmanager
def ensure_unchanged(files: Iterable[StatisticsFile]) -> Iterator[None]:
    """Ensure that files are not replaced between their check and the end of the context.

    Raises:
        ValueError: another process has replaced or removed one.
    """
    files = list(files)
    try:
        yield
    except (OSError, ValueError):  # a replaced file may be the cause
        _check(files)
        raise
    _check(files)


def _check(files: Iterable[StatisticsFile]) -> None:
    for file in files:
        if array_checksums(file.path) != file.contents:
            raise ValueError(f"{file.path} was replaced or removed by another process while it was in use here: give "
                             "each model and each text a stats_dir of its own")


def array_checksums(path: Path) -> str | None:
    """Checksums of a statistics file's arrays as listed in its archive; None if the file can't be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return " ".join(f"{member.CRC:08x}" for member in archive.infolist() if member.filename.startswith("mom2."))
    except Exception:  # a damaged archive fails in many ways; loading it reports the error
        return None


def fingerprint_path(path: Path) -> Path:
    """Path of a statistics file's fingerprint."""
    return path.with_name(f"{path.stem}_origin.json")


def write_fingerprint(path: Path, contents: str | None, fingerprint: Mapping[str, Any]) -> None:
    """Write the fingerprint of a statistics file that is about to be moved to ``path``."""
    with atomic_write(fingerprint_path(path)) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "contents": contents, **fingerprint}, indent=1) + "\n",
                             encoding="utf-8")


@dataclass(frozen=True)
class FileCheck:
    """Result of comparing a statistics file's fingerprint with the current model, text and settings.

    Attributes:
        file: None if the file does not exist.
        differences: descriptions of what differs; empty if the file fits.
        unknown: descriptions of what can't be compared.
        consistent: the fingerprint belongs to this file; False, for instance, while another process replaces the file.
    """

    file: StatisticsFile | None
    differences: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    consistent: bool = True

    @property
    def fits(self) -> bool:
        """Whether the file exists and nothing differs."""
        return self.file is not None and not self.differences


class StatisticsFingerprints:
    """Computes and compares the fingerprints of a model's statistics files; each digest is computed once, when needed.

    Args:
        editable: the model, with its unedited weights.
        hparams: text source and settings of the statistics.
        tok: the tokenizer; without it, neither text, tokenizer nor settings are compared.
    """

    def __init__(self, editable: EditableModel, hparams: SPHEREHyperParams, tok: PreTrainedTokenizerBase | None = None
                 ) -> None:
        self._editable, self._hparams, self._tok = editable, hparams, tok
        self._digests: dict[str, str] = {}

    def expected(self, layer: int) -> dict[str, Any]:
        """Fingerprint that a layer's statistics collected now would have, for JSON."""
        model = {"model": self._digest(self._names_below(layer)), "config": self._config}
        return model if self._tok is None else {**model, **self._text_fingerprint}

    def text_origin(self) -> dict[str, Any]:
        """What the text that the model writes (``mom2_dataset: generated``) depends on, for JSON."""
        assert self._tok is not None
        length = min(text_length(self._editable, self._hparams), GENERATED_LENGTH)
        return {"model": self._digest(self._names_of_all()), "config": self._config,
                "tokenizer": self._text_fingerprint["tokenizer"], "seed": self._hparams.seed,
                "texts": self._hparams.mom2_n_samples, "tokens of a text": length}

    def check(self, path: Path, layer: int) -> FileCheck:
        """Compare the fingerprint of a layer's statistics file with the expected one."""
        # The file is read first: since its fingerprint is written before it, a missing one was never written.
        contents = array_checksums(path)
        if contents is None and not path.exists():
            return FileCheck(None)
        file = StatisticsFile(path, contents)
        try:
            stored = json.loads(fingerprint_path(path).read_text(encoding="utf-8"))
            known = stored["format"] == _FORMAT
        except FileNotFoundError:
            return FileCheck(file, unknown=("has no fingerprint (like EasyEdit's own files)",))
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s can't be read: %s", fingerprint_path(path), error)
            known = False
        if not known:
            return FileCheck(file, ("a fingerprint that can't be read",))
        if stored.get("contents") != contents:
            return FileCheck(file, unknown=("is not the file that its fingerprint was written for",), consistent=False)
        return FileCheck(file, *_compare(stored, self.expected(layer)))

    @cached_property
    def _config(self) -> Any:
        return _relevant(json.loads(json.dumps(self._editable.config.to_dict(), default=str)))

    @cached_property
    def _text_fingerprint(self) -> dict[str, Any]:
        assert self._tok is not None
        hparams = self._hparams
        source: dict[str, Any]
        text = text_source(hparams)
        if isinstance(text, Path):
            # The text need not be on every machine that uses the statistics.
            source = {"file": text.name, "form": text.suffix, "sha256": sha256_of(text) if text.is_file() else None}
        elif text is None:
            source = {"generated by": self._digest(self._names_of_all())}
        else:
            source = {"data set": text}
        return {"text": source, "tokenizer": tokenizer_digest(self._tok),
                "settings": {"tokens of a text": text_length(self._editable, hparams), "seed": hparams.seed}}

    def _names_below(self, layer: int) -> list[str]:
        """Parameters and buffers that a layer's keys may depend on: all but those known to be used later."""
        editable = self._editable
        names = editable.names
        later = [names.layer_module_tmp.format(block) for block in range(layer + 1, editable.num_blocks)]
        later += [names.rewrite_module_tmp.format(layer), names.ln_f_module]
        if editable.lm_head is not editable.model.get_input_embeddings():  # type: ignore[operator]
            later.append(names.lm_head_module)
        parameters = [name for name, _ in editable.model.named_parameters(remove_duplicate=False)]
        beginnings = tuple(f"{module}." for module in later)
        return [name for name in [*parameters, *persistent_buffers(editable.model)] if not name.startswith(beginnings)]

    def _names_of_all(self) -> list[str]:
        """All parameters and buffers; tied ones once, even if a tied head is registered as another parameter."""
        model = self._editable.model
        distinct: dict[Any, str] = {}
        for name in distinct_names(model):
            parameter = model.get_parameter(name)
            distinct.setdefault(name if parameter.is_meta else (parameter.data_ptr(), parameter.shape), name)
        return [*distinct.values(), *persistent_buffers(model)]

    def _digest(self, names: list[str]) -> str:
        missing = [name for name in names if name not in self._digests]
        self._digests |= tensor_digests(self._editable, missing)
        return hashlib.sha256("\n".join(f"{name} {self._digests[name]}" for name in sorted(names)).encode()).hexdigest()


def _relevant(config: Any) -> Any:
    """A config without the fields that keys do not depend on, nested configs included."""
    if not isinstance(config, dict):
        return config
    return {name: _relevant(value) for name, value in config.items()
            if not (name.startswith("_") or name.endswith(("token_id", "token_index")) or name in _IGNORED_FIELDS)}


def tokenizer_digest(tok: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary and of how it splits some probe texts.

    Its serialised form is not used, since that changes with the libraries' versions.
    """
    vocabulary = sorted(tok.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probed = [str(token).encode(errors="ignore").decode()  # without halves of surrogate pairs
              for token, _ in vocabulary[:: max(1, len(vocabulary) // _NUM_PROBED_TOKENS)]]
    texts = [*_TOKENIZER_PROBES, *(" ".join(probed[i: i + 40]) for i in range(0, len(probed), 40))]
    split = [list(tok(text, verbose=False)["input_ids"]) for text in texts]
    described = json.dumps([vocabulary, split, tok.bos_token_id, tok.eos_token_id], default=repr)
    return hashlib.sha256(described.encode()).hexdigest()


def _compare(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Descriptions of what differs, and of what can't be compared."""
    differences, unknown = [], []
    if stored.get("model") != expected["model"]:
        differences.append("other weights of the model")
    fields = differing_fields(stored.get("config"), expected["config"])
    if fields:
        differences.append(f"another config of the model ({', '.join(fields)})")
    if "text" in expected:
        text, was = expected["text"], stored.get("text")
        if text.get("sha256", "") is None:
            unknown.append(f"was collected from the text {text['file']}, which is not found here")
        elif not (isinstance(was, Mapping) and {**was, "file": None} == {**text, "file": None}):
            differences.append("another text")
        if stored.get("tokenizer") != expected["tokenizer"]:
            differences.append("another tokenizer")
        was = stored.get("settings")
        was = was if isinstance(was, Mapping) else {}
        differences += [f"{name} {was.get(name)} in place of {value}" for name, value in expected["settings"].items()
                        if was.get(name) != value]
    return tuple(differences), tuple(unknown)


def differing_fields(stored: Any, expected: Any) -> list[str]:
    """Fields with different values in both configs; fields of only one are ignored, as versions add and remove some."""
    if not isinstance(stored, Mapping):
        return ["unknown"]
    differing = []
    for name in sorted(stored.keys() & expected.keys()):
        if isinstance(stored[name], Mapping) and isinstance(expected[name], Mapping):
            differing += [f"{name}.{inner}" for inner in differing_fields(stored[name], expected[name])]
        elif stored[name] != expected[name]:
            differing.append(name)
    return differing
