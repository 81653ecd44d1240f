"""Finds the file of a published data set: a given path, the data folder, the cache, or a download.

A download, and a cached file each time it is used, is checked against the git blob id of the file in the SPHERE
authors' repository (SHA-1 over ``blob <size>``, a null byte and the content).
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import shutil
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..models.loading import cache_folder
from ..utils.files import atomic_write
from .facts import FACTS_FILE
from .json_records import existing
from .records import DatasetName, MissingDatasetError

logger = logging.getLogger(__name__)

_CHUNK: Final = 1 << 20  # bytes
_TIMEOUT: Final = 60  # seconds without a byte
_AUTHORS: Final = "https://raw.githubusercontent.com/PlusLabNLP/SPHERE/6e8978a8f6e707a7937567096f4a92a71ed5f2b2/data"


@dataclass(frozen=True)
class Published:
    """A published data set's file.

    Attributes:
        file: its name.
        what: description for errors.
        url: http, https or file.
        git_blob: id of the content in git.
    """

    file: str
    what: str
    url: str
    git_blob: str


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


def dataset_path(dataset: DatasetName, path: Path | str | None = None) -> Path:
    """The file of a data set, downloaded if necessary.

    The first of: ``path``; the published file's name in the folder ``$SPHERE_DATA``; the same in ``data`` of the
    package's cache folder (``$SPHERE_CACHE``, ``~/.cache/sphere-easyedit``); a download to there, unless
    ``HF_HUB_OFFLINE`` is set.

    Args:
        dataset: ``counterfact``, ``multi_counterfact`` or ``zsre``; any other needs ``path``.
        path: a local file.

    Raises:
        MissingDatasetError: no such file, and it could not be downloaded completely.
        ValueError: a downloaded file is not the published one, or the data set ships with the package.
    """
    if dataset == "demo":
        raise ValueError("data set demo ships with the package and has no file")
    published = PUBLISHED.get(dataset)
    if path is not None:
        return existing(Path(path), FACTS_FILE if published is None else published.what)
    if published is None:
        raise MissingDatasetError(f"data set {dataset} needs a file: give the path of {FACTS_FILE}")
    folder = os.environ.get("SPHERE_DATA")
    if folder and (Path(folder) / published.file).exists():
        return existing(Path(folder) / published.file, published.what)
    target = cache_folder() / "data" / published.file
    if target.exists():
        _check(target, str(target), published)
    else:
        download(published, target)
    return target


def download(published: Published, target: Path) -> None:
    """Download a file to ``target``; an incomplete or different file is not kept.

    Raises:
        MissingDatasetError: offline, not found, or incomplete.
        ValueError: the checksum differs.
    """
    url = published.url
    remedy = (f"download {url} elsewhere and put it at {target.absolute()} or into the folder $SPHERE_DATA, or give "
              "its path")
    if _offline():
        raise MissingDatasetError(f"data set file {target.name} is not here and HF_HUB_OFFLINE is set: {remedy}")
    logger.info("downloading %s to %s", url, target)
    try:
        # The folder is created only when there is content for it.
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, atomic_write(target) as temporary:
            announced = response.headers.get("Content-Length")
            with temporary.open("wb") as file:
                shutil.copyfileobj(response, file, _CHUNK)
            received = temporary.stat().st_size
            if announced is not None and received != int(announced):
                raise MissingDatasetError(f"{url}: received {received} of {announced} bytes and kept nothing: try "
                                          f"again, or {remedy}")
            _check(temporary, url, published)
    except MissingDatasetError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise MissingDatasetError(
            f"data set file {target.name} is not here and could not be downloaded ({error}): {remedy}") from error


def _check(file: Path, source: str, published: Published) -> None:
    """Refuse a file that is not the published one; ``source`` names it in the error."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != published.git_blob:
        raise ValueError(f"{source}: its git blob id is {digest.hexdigest()}, but that of the published file is "
                         f"{published.git_blob}: remove it and get it again, or give its path to use the other content")


def _offline() -> bool:
    from huggingface_hub import constants  # slow to import

    return bool(constants.HF_HUB_OFFLINE)
