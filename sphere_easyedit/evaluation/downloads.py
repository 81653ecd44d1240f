"""Where a published data set's file is: given, in a folder of data, downloaded before, or downloaded now.

What is downloaded is checked before it takes its place. Checksums come from three places, none of them made up:
the caller (``sha256``); the git blob id under which the SPHERE authors' repository keeps the file, which pins its every
byte; and the SHA-256 that a first download leaves in a file beside the data (``counterfact.json.sha256``, in the format
of ``sha256sum``), which every later load and every later download must meet.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..files import atomic_write, checksum_path, record_checksum, recorded_checksum, sha256_of
from ..loading import cache_folder
from .facts import FACTS_FILE
from .json_records import existing
from .records import DatasetName, MissingDatasetError

logger = logging.getLogger(__name__)

_CHUNK: Final = 1 << 20  # bytes
_TIMEOUT: Final = 60  # seconds without a byte
_AUTHORS: Final = "https://raw.githubusercontent.com/PlusLabNLP/SPHERE/6e8978a8f6e707a7937567096f4a92a71ed5f2b2/data"


@dataclass(frozen=True)
class Published:
    """A data set's file as its publishers name it.

    Attributes:
        file: its name.
        what: it in words, for errors.
        url: where it can be had.
        git_blob: id of the file's content in git at that address (SHA-1 over ``blob <size>``, a null byte and the
            content); None where it is not known.
    """

    file: str
    what: str
    url: str
    git_blob: str | None = None


PUBLISHED: Final[Mapping[DatasetName, Published]] = MappingProxyType({
    "counterfact": Published(
        "counterfact.json", "counterfact.json of the ROME/MEMIT data (a list of records with requested_rewrite)",
        f"{_AUTHORS}/counterfact.json", "0438cec67baf7f95450d8ad8b36a63c4d81800ff"),
    "multi_counterfact": Published(
        "multi_counterfact.json", "multi_counterfact.json of the MEMIT data (a list of records with requested_rewrite)",
        f"{_AUTHORS}/multi_counterfact.json", "57b3583780b5a0554add60e4172d950e5a019523"),
    "zsre": Published(
        "zsre_mend_eval.json",
        "zsre_mend_eval.json of the ROME/MEMIT data (a list of records with src, rephrase, answers, loc)",
        f"{_AUTHORS}/zsre_mend_eval.json", "8546c90abc10b77ebc9fd69de178cf7837ff86dc"),
})


def dataset_path(
    dataset: DatasetName, path: Path | str | None = None, cache_dir: Path | str | None = None,
    sha256: str | None = None,
) -> Path:
    """The file of a data set, downloaded if need be.

    The first that there is of: ``path``; the published file's name in the folder ``$SPHERE_DATA``; the same in
    ``cache_dir``; a download into ``cache_dir``. Nothing is tried over the network where ``HF_HUB_OFFLINE`` is set.

    Args:
        dataset: ``counterfact``, ``multi_counterfact`` or ``zsre``; any other needs ``path``.
        path: a local file; it wins.
        cache_dir: None for ``data`` in the package's cache folder (``$SPHERE_CACHE``, ``~/.cache/sphere-easyedit``).
        sha256: what the file must hash to, 64 hex digits, wherever it comes from.

    Raises:
        MissingDatasetError: no such file, and none could be downloaded whole; the error says what to put where.
        ValueError: a checksum does not agree, or is no SHA-256; the data set ships with the package.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 is {sha256!r}: give 64 hex digits, or leave it out")
    if dataset == "demo":
        raise ValueError("data set demo ships with the package and has no file")
    published = PUBLISHED.get(dataset)
    what = FACTS_FILE if published is None else published.what
    if path is not None:
        return _local(Path(path), what, sha256)
    if published is None:
        raise MissingDatasetError(f"data set {dataset} needs a file: give the path of {what}")
    folder = os.environ.get("SPHERE_DATA")
    if folder and (Path(folder) / published.file).exists():
        return _local(Path(folder) / published.file, what, sha256)
    target = (cache_folder() / "data" if cache_dir is None else Path(cache_dir)) / published.file
    if target.exists():
        return _cached(target, published, sha256)
    download(published.url, target, sha256, published.git_blob)
    return target


def download(url: str, target: Path, sha256: str | None = None, git_blob: str | None = None) -> str:
    """Bring a file to ``target``, whole and checked or not at all, and leave its SHA-256 in a file beside it.

    Args:
        url: http, https or file.
        target: written under another name and renamed once it is checked.
        sha256: what it must hash to; None for what a former download left beside ``target``, if there was one.
        git_blob: the content's id in git, which counts where there is no SHA-256 to go by.

    Returns:
        The SHA-256 of what came, in hex.

    Raises:
        MissingDatasetError: the network is off or the address gives nothing, or less than it announced.
        ValueError: a checksum does not agree.
    """
    remedy = (f"download {url} elsewhere and put it at {target.absolute()} or into the folder $SPHERE_DATA, or give "
              "the path where it is")
    if _offline():
        raise MissingDatasetError(f"data set file {target.name} is not here and HF_HUB_OFFLINE is set: {remedy}")
    logger.info("downloading %s to %s", url, target)
    try:
        # The folder is made only once there is something to put into it.
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, atomic_write(target) as temporary:
            announced = response.headers.get("Content-Length")
            with temporary.open("wb") as file:
                shutil.copyfileobj(response, file, _CHUNK)
            came = temporary.stat().st_size
            if announced is not None and came != int(announced):
                raise MissingDatasetError(f"{url}: {came} of {announced} bytes came, so nothing was kept: try again, "
                                          f"or {remedy}")
            found = _check(temporary, url, target, sha256, git_blob)
    except MissingDatasetError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise MissingDatasetError(
            f"data set file {target.name} is not here and could not be downloaded ({error}): {remedy}") from error
    record_checksum(target, found)
    return found


def _local(path: Path, what: str, sha256: str | None) -> Path:
    existing(path, what)
    if sha256 is not None:
        _check(path, str(path), path, sha256, None)
    return path


def _cached(target: Path, published: Published, sha256: str | None) -> Path:
    found = _check(target, str(target), target, sha256, published.git_blob)
    if not checksum_path(target).exists():  # the file was put there by hand
        try:
            record_checksum(target, found)
        except OSError as error:  # a folder that others share may not be ours to write
            logger.warning("the checksum of %s can't be kept beside it: %s", target, error)
    return target


def _check(file: Path, source: str, target: Path, sha256: str | None, git_blob: str | None) -> str:
    """The file's SHA-256, once it meets the best checksum for ``target``: the caller's, the one beside it, git's."""
    found = sha256_of(file)
    if sha256 is not None:
        if found != sha256.lower():
            raise ValueError(f"{source}: its sha256 is {found}, but {sha256.lower()} was asked for: remove it and get "
                             "it again, or ask for the one that it has")
    elif (recorded := recorded_checksum(target)) is not None:
        if found != recorded:
            raise ValueError(f"{source}: its sha256 is {found}, but {checksum_path(target)} says {recorded}: remove it "
                             "and get it again, or remove that record if the other content is meant")
    elif git_blob is not None and (blob := _git_blob(file)) != git_blob:
        raise ValueError(f"{source}: its git blob id is {blob}, but that of the published file is {git_blob}: remove "
                         "it and get it again, or give its path if the other content is meant")
    return found


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _offline() -> bool:
    from huggingface_hub import constants  # only a download pays for it

    return bool(constants.HF_HUB_OFFLINE)
