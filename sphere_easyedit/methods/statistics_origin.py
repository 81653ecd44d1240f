"""Fingerprints of statistics files: what each was collected from, written to a file beside it.

Paths of statistics name a model and a text by the last component of their own paths, as EasyEdit does, so two models
may share one. Beside every file that we write lies ``..._origin.json``: digests of the model's weights that the layer's
keys depend on, of the text and of the tokenizer, the model's config and the settings that the path does not name.

A file and its fingerprint always fit each other, whoever is killed when: a fingerprint names the contents of its file,
an old file is removed before the new fingerprint is written, and the new file comes last.
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
from .corpus import text_length, text_source

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams

logger = logging.getLogger(__name__)

_FORMAT = "sphere-easyedit statistics 1"
# Fields of a config that keys do not depend on, besides names of token ids and what begins with an underscore. What
# the weights are stored in is told by their digests.
_NOT_OF_KEYS = frozenset({"architectures", "attn_implementation", "dtype", "quantization_config",
                          "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"})
_PROBE = ("The quick brown fox jumps over 13 lazy dogs. ", "  Don't STOP\tnow,\n\nit's 2,048.5% done: (x_1 != y) {z}",
          "Über façade naïve — “Ελλάδα” Москва 東京 서울 عربى हिन्दी 🙂")
_TOKENS_PROBED = 2000  # of the vocabulary, besides


@dataclass(frozen=True)
class StatisticsFile:
    """A file of statistics as it was when it was found to fit.

    Attributes:
        path: where it is.
        contents: its checksums (see ``contents_of``).
    """

    path: Path
    contents: str | None


@contextmanager
def unchanged(files: Iterable[StatisticsFile]) -> Iterator[None]:
    """Make sure that what is read from files inside the context is what was found to fit.

    Raises:
        ValueError: another process has replaced or removed one meanwhile.
    """
    files = list(files)
    try:
        yield
    except (OSError, ValueError):  # perhaps of just that
        _check(files)
        raise
    _check(files)


def _check(files: Iterable[StatisticsFile]) -> None:
    for file in files:
        if contents_of(file.path) != file.contents:
            raise ValueError(f"{file.path} was replaced or removed by another process while it was in use here: give "
                             "each model and each text a stats_dir of its own")


def contents_of(path: Path) -> str | None:
    """Checksums of a statistics file's arrays, as its archive lists them; None where there is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return " ".join(f"{member.CRC:08x}" for member in archive.infolist() if member.filename.startswith("mom2."))
    except Exception:  # a damaged archive fails in many ways; whoever loads it says so
        return None


def origin_path(path: Path) -> Path:
    """Where the fingerprint of a statistics file is kept."""
    return path.with_name(f"{path.stem}_origin.json")


def write_origin(path: Path, contents: str | None, origin: Mapping[str, Any]) -> None:
    """Write the fingerprint of a statistics file that is about to take its place at ``path``."""
    with atomic_write(origin_path(path)) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "contents": contents, **origin}, indent=1) + "\n",
                             encoding="utf-8")


@dataclass(frozen=True)
class Finding:
    """A statistics file and how it fits.

    Attributes:
        file: None where there is none.
        differences: what it was collected from that is otherwise here, in words; none where it fits.
        unknown: what can't be compared, in words.
        settled: False if its fingerprint names other contents, as while another process replaces the file.
    """

    file: StatisticsFile | None
    differences: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    settled: bool = True

    @property
    def fits(self) -> bool:
        """Whether the file can be used."""
        return self.file is not None and not self.differences


class Origins:
    """What statistics of a model's keys are collected from, layer by layer.

    Digests are computed when they are needed, each once.

    Args:
        editable: the model, with the weights that the statistics are of.
        hparams: with the text and its settings.
        tok: without it, neither the text nor the tokenizer is compared.
    """

    def __init__(self, editable: EditableModel, hparams: SPHEREHyperParams, tok: PreTrainedTokenizerBase | None = None
                 ) -> None:
        self._editable, self._hparams, self._tok = editable, hparams, tok
        self._digests: dict[str, str] = {}

    def of(self, layer: int) -> dict[str, Any]:
        """The content of a layer's fingerprint, for JSON."""
        model = {"model": self._digest(self._names_below(layer)), "config": self._config}
        return model if self._tok is None else {**model, **self._of_text}

    def examine(self, path: Path, layer: int) -> Finding:
        """Compare a layer's statistics file with what it would be collected from now."""
        # The file first: its fingerprint was written before it, so one that is not there was never written.
        contents = contents_of(path)
        if contents is None and not path.exists():
            return Finding(None)
        file = StatisticsFile(path, contents)
        try:
            stored = json.loads(origin_path(path).read_text(encoding="utf-8"))
            known = stored["format"] == _FORMAT
        except FileNotFoundError:
            return Finding(file, unknown=("has no fingerprint (as EasyEdit's own)",))
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s can't be read: %s", origin_path(path), error)
            known = False
        if not known:
            return Finding(file, ("a fingerprint that can't be read",))
        if stored.get("contents") != contents:
            return Finding(file, unknown=("is not the file that its fingerprint was written for",), settled=False)
        return Finding(file, *_compared(stored, self.of(layer)))

    @cached_property
    def _config(self) -> Any:
        return _of_keys(json.loads(json.dumps(self._editable.config.to_dict(), default=str)))

    @cached_property
    def _of_text(self) -> dict[str, Any]:
        """What the text, its tokens and the settings are told by."""
        assert self._tok is not None
        hparams = self._hparams
        source: dict[str, Any]
        text = text_source(hparams)
        if isinstance(text, Path):
            # Statistics may be used where the text that they came from is not.
            source = {"file": text.name, "form": text.suffix, "sha256": sha256_of(text) if text.is_file() else None}
        elif text is None:
            source = {"generated by": self._digest(self._names_of_all())}
        else:
            source = {"data set": text}
        return {"text": source, "tokenizer": tokenizer_digest(self._tok),
                "settings": {"tokens of a text": text_length(self._editable, hparams), "seed": hparams.seed}}

    def _names_below(self, layer: int) -> list[str]:
        """Parameters and buffers that a layer's keys may depend on: all but those that are known to come later."""
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
        """All parameters and buffers; tied ones once, also where a tied head was given a parameter of its own."""
        model = self._editable.model
        found: dict[Any, str] = {}
        for name in distinct_names(model):
            parameter = model.get_parameter(name)
            found.setdefault(name if parameter.is_meta else (parameter.data_ptr(), parameter.shape), name)
        return [*found.values(), *persistent_buffers(model)]

    def _digest(self, names: list[str]) -> str:
        missing = [name for name in names if name not in self._digests]
        self._digests |= tensor_digests(self._editable, missing)
        return hashlib.sha256("\n".join(f"{name} {self._digests[name]}" for name in sorted(names)).encode()).hexdigest()


def _of_keys(config: Any) -> Any:
    """A config, with those within it, without the fields that keys do not depend on."""
    if not isinstance(config, dict):
        return config
    return {name: _of_keys(value) for name, value in config.items()
            if not (name.startswith("_") or name.endswith(("token_id", "token_index")) or name in _NOT_OF_KEYS)}


def tokenizer_digest(tok: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary, and of how it splits some texts: all that it does to text shows there.

    Its serialisation would change from version to version of the libraries.
    """
    vocabulary = sorted(tok.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probed = [str(token).encode(errors="ignore").decode()  # without halves of surrogate pairs
              for token, _ in vocabulary[:: max(1, len(vocabulary) // _TOKENS_PROBED)]]
    texts = [*_PROBE, *(" ".join(probed[i: i + 40]) for i in range(0, len(probed), 40))]
    split = [list(tok(text, verbose=False)["input_ids"]) for text in texts]
    described = json.dumps([vocabulary, split, tok.bos_token_id, tok.eos_token_id], default=repr)
    return hashlib.sha256(described.encode()).hexdigest()


def _compared(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What differs, and what can't be compared, both in words."""
    differences, unknown = [], []
    if stored.get("model") != wanted["model"]:
        differences.append("other weights of the model")
    fields = _differing(stored.get("config"), wanted["config"])
    if fields:
        differences.append(f"another config of the model ({', '.join(fields)})")
    if "text" in wanted:
        text, was = wanted["text"], stored.get("text")
        if text.get("sha256", "") is None:
            unknown.append(f"was collected from a text, {text['file']}, that is not here to be compared")
        elif not (isinstance(was, Mapping) and {**was, "file": None} == {**text, "file": None}):
            differences.append("another text")
        if stored.get("tokenizer") != wanted["tokenizer"]:
            differences.append("another tokenizer")
        was = stored.get("settings")
        was = was if isinstance(was, Mapping) else {}
        differences += [f"{name} {was.get(name)} in place of {value}" for name, value in wanted["settings"].items()
                        if was.get(name) != value]
    return tuple(differences), tuple(unknown)


def _differing(stored: Any, wanted: Any) -> list[str]:
    """Fields that both configs have, with other values. Versions of transformers add fields and take some away."""
    if not isinstance(stored, Mapping):
        return ["unknown"]
    found = []
    for name in sorted(stored.keys() & wanted.keys()):
        if isinstance(stored[name], Mapping) and isinstance(wanted[name], Mapping):
            found += [f"{name}.{inner}" for inner in _differing(stored[name], wanted[name])]
        elif stored[name] != wanted[name]:
            found.append(name)
    return found
