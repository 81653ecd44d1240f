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

from sphere_easyedit.evaluation import downloads
from sphere_easyedit.evaluation.datasets import MissingDatasetError, load_records
from sphere_easyedit.evaluation.downloads import PUBLISHED, Published, dataset_path, download

CONTENT = json.dumps([{
    "subject": "Bari", "src": "Where is Bari?", "rephrase": "Bari is where?", "alt": "Oslo", "answers": ["Italy"],
    "loc": "nq question: who wrote it", "loc_ans": "A. Mariner",
}]).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
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


def publish(monkeypatch: pytest.MonkeyPatch, url: str, blob: str | None = BLOB) -> None:
    monkeypatch.setattr(downloads, "PUBLISHED", {"zsre": Published(NAME, "the ZsRE file", url, blob)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- downloads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pins", [{}, {"sha256": SHA256}, {"sha256": SHA256.upper()}, {"git_blob": BLOB},
                                  {"sha256": SHA256, "git_blob": "0" * 40}])
def test_good_download(server: tuple[str, list[str]], tmp_path: Path, pins: dict[str, str]) -> None:
    target = tmp_path / "data" / NAME
    assert download(f"{server[0]}/good", target, **pins) == SHA256
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == [NAME, f"{NAME}.sha256"]
    checked = subprocess.run(["sha256sum", "-c", f"{NAME}.sha256"], cwd=target.parent, capture_output=True, check=False)
    assert checked.returncode == 0, checked


def test_file_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "there").write_bytes(CONTENT)
    assert download((tmp_path / "there").as_uri(), tmp_path / NAME, SHA256) == SHA256
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "pins", "error", "message"),
    [
        ("/good", {"sha256": "0" * 64}, ValueError, f"its sha256 is {SHA256}, but {'0' * 64} was asked for"),
        ("/good", {"git_blob": "0" * 40}, ValueError, f"its git blob id is {BLOB}, but .* is {'0' * 40}"),
        ("/other", {"git_blob": BLOB}, ValueError, "its git blob id is "),
        ("/torn", {}, MissingDatasetError, rf"40 of {len(CONTENT)} bytes came, so nothing was kept: try again"),
        ("/chunks", {}, MissingDatasetError, "could not be downloaded"),
        ("/absent", {}, MissingDatasetError, r"not be downloaded \(HTTP Error 404: Not Found\): download .*/absent"),
    ],
)
def test_bad_download_leaves_nothing(server: tuple[str, list[str]], tmp_path: Path, path: str, pins: dict[str, str],
                                     error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        download(server[0] + path, tmp_path / "data" / NAME, **pins)
    assert isinstance(caught.value, MissingDatasetError) == (error is MissingDatasetError)
    assert names(tmp_path / "data") == []
    assert server[1] == [path]


def test_bad_download_leaves_what_was_there(server: tuple[str, list[str]], tmp_path: Path) -> None:
    target = tmp_path / NAME
    download(f"{server[0]}/good", target)
    with pytest.raises(ValueError, match=rf"/other: its sha256 is .*, but .*{NAME}.sha256 says {SHA256}"):
        download(f"{server[0]}/other", target)
    assert target.read_bytes() == CONTENT and names(tmp_path) == [NAME, f"{NAME}.sha256"]
    download(f"{server[0]}/other", target, hashlib.sha256(b"[]").hexdigest())  # asked for by name
    assert target.read_bytes() == b"[]"


def test_unreachable(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    target = tmp_path / "data" / NAME
    with pytest.raises(MissingDatasetError) as caught:
        download("http://127.0.0.1:9/zsre.json", target)
    message = str(caught.value)
    assert f"{NAME} is not here and could not be downloaded" in message
    assert "download http://127.0.0.1:9/zsre.json elsewhere" in message and str(target) in message
    assert not target.parent.exists()


def test_offline_asks_nobody(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDatasetError, match=rf"{NAME} is not here and HF_HUB_OFFLINE is set: download http"):
        download(f"{server[0]}/good", tmp_path / NAME)
    assert server[1] == [] and names(tmp_path) == []


# --- which file -------------------------------------------------------------------------------------------------


def test_path_wins_then_the_data_folder_then_the_cache(
    server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, f"{server[0]}/good")
    cache, data, given = tmp_path / "cache", tmp_path / "data", tmp_path / "mine.json"
    assert dataset_path("zsre", cache_dir=cache) == cache / NAME
    assert dataset_path("zsre", cache_dir=cache) == cache / NAME
    assert server[1] == ["/good"]
    data.mkdir()
    monkeypatch.setenv("SPHERE_DATA", str(data))
    assert dataset_path("zsre", cache_dir=cache) == cache / NAME
    (data / NAME).write_text("[]")
    assert dataset_path("zsre", cache_dir=cache) == data / NAME
    with pytest.raises(MissingDatasetError, match=r"mine.json does not exist .* put the ZsRE file there"):
        dataset_path("zsre", given, cache)
    given.write_bytes(CONTENT)
    assert dataset_path("zsre", str(given), cache) == given
    assert names(tmp_path) == ["cache", "data", "mine.json"]  # nothing is left beside a user's own files
    assert dataset_path("zsre", given, sha256=SHA256) == given
    with pytest.raises(ValueError, match="was asked for"):
        dataset_path("zsre", sha256=SHA256)


def test_cache_is_checked_on_every_load(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    publish(monkeypatch, f"{server[0]}/good")
    path = dataset_path("zsre", cache_dir=tmp_path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=rf"{NAME}: its sha256 is .*, but .*{NAME}.sha256 says {SHA256}: remove it"):
        dataset_path("zsre", cache_dir=tmp_path)
    path.unlink()
    assert dataset_path("zsre", cache_dir=tmp_path).read_bytes() == CONTENT
    path.with_name(f"{NAME}.sha256").write_text("nothing")
    with pytest.raises(ValueError, match=rf"{NAME}.sha256 holds no sha256: remove it"):
        dataset_path("zsre", cache_dir=tmp_path)


def test_file_put_into_the_cache_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPHERE_DATA", raising=False)
    publish(monkeypatch, "http://127.0.0.1:9/")
    (tmp_path / NAME).write_bytes(b"[]")
    with pytest.raises(ValueError, match="its git blob id is .*give its path if the other content is meant"):
        dataset_path("zsre", cache_dir=tmp_path)
    (tmp_path / NAME).write_bytes(CONTENT)
    assert dataset_path("zsre", cache_dir=tmp_path) == tmp_path / NAME
    assert names(tmp_path) == [NAME, f"{NAME}.sha256"]


def test_load_records_downloads(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHERE_CACHE", str(tmp_path))
    publish(monkeypatch, f"{server[0]}/good")
    (record,) = load_records("zsre")
    assert record.subject == "Bari" and server[1] == ["/good"]
    assert (tmp_path / "data" / NAME).is_file()
    with pytest.raises(ValueError, match=r"num_edits is 2, but zsre \(published\) holds 1 records"):
        load_records("zsre", None, 2)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demo ships with the package"):
        dataset_path("demo")
    with pytest.raises(MissingDatasetError, match="facts needs a file"):
        dataset_path("facts")
    with pytest.raises(ValueError, match="sha256 is 'abc': give 64 hex digits"):
        dataset_path("zsre", tmp_path, sha256="abc")


def test_published_files_are_pinned_and_named_apart() -> None:
    assert set(PUBLISHED) == {"counterfact", "multi_counterfact", "zsre"}
    assert len({(entry.file, entry.git_blob) for entry in PUBLISHED.values()}) == 3
    for entry in PUBLISHED.values():
        assert entry.url.startswith("https://") and entry.url.endswith(f"/{entry.file}")
        assert entry.git_blob is not None and len(entry.git_blob) == 40


def test_blob_id_is_gits_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    try:
        done = subprocess.run(["git", "hash-object", "file"], cwd=tmp_path, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert done.stdout.strip() == BLOB == downloads._git_blob(tmp_path / "file")
