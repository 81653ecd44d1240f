"""Where a data set's file comes from; downloads against a server on this machine: good, wrong, torn and none."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sphere_easyedit.datasets import downloads
from sphere_easyedit.datasets.downloads import PUBLISHED, Published, dataset_path, download
from sphere_easyedit.datasets.loaders import MissingDatasetError, load_records

CONTENT = json.dumps([{
    "subject": "Bari", "src": "Where is Bari?", "rephrase": "Bari is where?", "alt": "Oslo", "answers": ["Italy"],
    "loc": "nq question: who wrote it", "loc_ans": "A. Mariner",
}]).encode()
BLOB = hashlib.sha1(f"blob {len(CONTENT)}\0".encode() + CONTENT).hexdigest()
NAME = "zsre_mend_eval.json"


class Handler(http.server.BaseHTTPRequestHandler):
    """``/good`` is whole, ``/torn`` and ``/chunks`` break off, ``/other`` is another file; nothing else is there."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path not in ("/good", "/torn", "/chunks", "/other"):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(CONTENT) + CONTENT[:40])
            return
        body = b"[]" if self.path == "/other" else CONTENT
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:40] if self.path == "/torn" else body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Address and the paths that were asked for."""
    requests: list[str] = []
    handler = type("Asked", (Handler,), {"requests": requests})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SPHERE_DATA", raising=False)
    yield f"http://127.0.0.1:{running.server_port}", requests
    running.shutdown()
    running.server_close()
    thread.join()


def published(url: str, blob: str = BLOB) -> Published:
    return Published(NAME, "the ZsRE file", url, blob)


def publish(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(downloads, "PUBLISHED", {"zsre": published(url)})
    monkeypatch.setenv("SPHERE_CACHE", str(cache))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- downloads --------------------------------------------------------------------------------------------------


def test_good_download(server: tuple[str, list[str]], tmp_path: Path) -> None:
    target = tmp_path / "data" / NAME
    download(published(f"{server[0]}/good"), target)
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == [NAME]


def test_file_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "there").write_bytes(CONTENT)
    download(published((tmp_path / "there").as_uri()), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "blob", "error", "message"),
    [
        ("/good", "0" * 40, ValueError, f"its git blob id is {BLOB}, but .* is {'0' * 40}"),
        ("/other", BLOB, ValueError, "/other: its git blob id is .* remove it and get it again"),
        ("/torn", BLOB, MissingDatasetError, rf"received 40 of {len(CONTENT)} bytes and kept nothing: try again"),
        ("/chunks", BLOB, MissingDatasetError, "could not be downloaded"),
        ("/absent", BLOB, MissingDatasetError, r"not be downloaded \(HTTP Error 404: Not Found\): download .*/absent"),
    ],
)
@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_bad_download_leaves_what_was_there(
        server: tuple[str, list[str]], tmp_path: Path, path: str, blob: str, error: type[Exception], message: str,
        earlier: bytes | None) -> None:
    target = tmp_path / "data" / NAME
    if earlier is not None:
        target.parent.mkdir()
        target.write_bytes(earlier)
    with pytest.raises(error, match=message) as caught:
        download(published(server[0] + path, blob), target)
    assert isinstance(caught.value, MissingDatasetError) == (error is MissingDatasetError)
    assert names(tmp_path / "data") == ([] if earlier is None else [NAME])
    assert earlier is None or target.read_bytes() == earlier
    assert server[1] == [path]


def test_unreachable(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    target = tmp_path / "data" / NAME
    with pytest.raises(MissingDatasetError) as caught:
        download(published("http://127.0.0.1:9/zsre.json"), target)
    message = str(caught.value)
    assert f"{NAME} is not here and could not be downloaded" in message
    assert "download http://127.0.0.1:9/zsre.json elsewhere" in message and str(target) in message
    assert not target.parent.exists()


def test_offline_asks_nobody(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDatasetError, match=rf"{NAME} is not here and HF_HUB_OFFLINE is set: download http"):
        download(published(f"{server[0]}/good"), tmp_path / NAME)
    assert server[1] == [] and names(tmp_path) == []


# --- which file -------------------------------------------------------------------------------------------------


def test_path_wins_then_the_data_folder_then_the_cache(
    server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, f"{server[0]}/good", tmp_path / "cache")
    cached, data, given = tmp_path / "cache" / "data" / NAME, tmp_path / "data", tmp_path / "mine.json"
    assert dataset_path("zsre") == cached
    assert dataset_path("zsre") == cached
    assert server[1] == ["/good"]
    data.mkdir()
    monkeypatch.setenv("SPHERE_DATA", str(data))
    assert dataset_path("zsre") == cached
    (data / NAME).write_text("[]")
    assert dataset_path("zsre") == data / NAME
    with pytest.raises(MissingDatasetError, match=r"mine.json does not exist .* put the ZsRE file there"):
        dataset_path("zsre", given)
    given.write_bytes(b"another")
    assert dataset_path("zsre", str(given)) == given


def test_cache_is_checked_on_every_load(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    publish(monkeypatch, f"{server[0]}/good", tmp_path)
    path = dataset_path("zsre")
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="its git blob id is .*give its path to use the other content"):
        dataset_path("zsre")
    path.unlink()
    assert dataset_path("zsre").read_bytes() == CONTENT
    assert names(path.parent) == [NAME]


def test_load_records_downloads(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, f"{server[0]}/good", tmp_path)
    (record,) = load_records("zsre")
    assert record.subject == "Bari" and server[1] == ["/good"]
    assert (tmp_path / "data" / NAME).is_file()
    with pytest.raises(ValueError, match=r"num_edits is 2, but zsre \(published\) has 1 records"):
        load_records("zsre", None, 2)


def test_data_sets_without_a_published_file() -> None:
    with pytest.raises(ValueError, match="demo ships with the package"):
        dataset_path("demo")
    with pytest.raises(MissingDatasetError, match="facts needs a file"):
        dataset_path("facts")


def test_published_files_are_pinned_and_named_apart() -> None:
    assert set(PUBLISHED) == {"counterfact", "multi_counterfact", "zsre"}
    assert len({(entry.file, entry.git_blob) for entry in PUBLISHED.values()}) == 3
    for entry in PUBLISHED.values():
        assert entry.url.startswith("https://") and entry.url.endswith(f"/{entry.file}")
        assert len(entry.git_blob) == 40


def test_blob_id_is_gits_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    try:
        done = subprocess.run(["git", "hash-object", "file"], cwd=tmp_path, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert done.stdout.strip() == BLOB
