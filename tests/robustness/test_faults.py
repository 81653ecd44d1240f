"""What breaks from outside, made to happen: a full disk, killed processes, damaged files, a clock that goes back."""

from __future__ import annotations

import ast
import dataclasses
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.faulty_runs import checkpointed, state_of, unchanged
from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit.datasets.downloads import PUBLISHED, dataset_path
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing import checkpoints
from sphere_easyedit.editing.checkpoints import (
    load_weights,
    remove_old_checkpoints,
    resumable,
    save_checkpoint,
    session_path,
    weights_path,
)
from sphere_easyedit.editing.session import resume_from
from sphere_easyedit.methods import covariance
from sphere_easyedit.methods.covariance import second_moments, statistics_files
from sphere_easyedit.methods.statistics_fingerprint import fingerprint_path
from sphere_easyedit.models.loading import smollm2_folder
from sphere_easyedit.runs.directory import RunDirectory
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential
from sphere_easyedit.utils.files import atomic_write, checksum_path, locked, remove_partial_files

PACKAGE = Path(sphere.__file__).parent
FORK = multiprocessing.get_context("fork")


class Disk:
    """A file system of one megabyte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, room: int) -> None:
        """Fill it up but for so many bytes (rounded up to pages)."""
        filler = self.folder / "filler"
        filler.unlink(missing_ok=True)
        left = os.statvfs(self.folder)
        with filler.open("wb") as stream:
            stream.write(b"x" * max(0, left.f_bavail * left.f_frsize - room))

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here ({error})")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- no room -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(disk: Disk) -> None:
    path = disk.folder / "file.txt"
    path.write_text("old")
    disk.leave(8192)
    with pytest.raises(OSError, match=r"free disk space.*file\.txt") as caught, atomic_write(path) as temporary:
        temporary.write_bytes(b"x" * 50_000)
    assert caught.value.errno == errno.ENOSPC
    assert names(disk.folder) == ["file.txt", "filler"]
    assert path.read_text() == "old"
    disk.leave(0)  # not even a temporary file
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as temporary:
        temporary.write_bytes(b"new" * 5000)
    assert path.read_text() == "old"


@pytest.mark.parametrize("room", [0, 8, 40, 72, 100, 200, 300])
def test_a_checkpoint_without_room_leaves_the_one_before(disk: Disk, room: int, tmp_path: Path) -> None:
    hparams, folder = tiny_hparams(tmp_path), disk.folder / "checkpoints"
    model = checkpointed(folder, hparams, 4)
    first = {name: (folder / name).read_bytes() for name in names(folder)}
    editable, session = hparams.editable(model), sphere.EditSession.of(model)
    session.num_edits = 8
    disk.leave(room * 1024)
    try:
        save_checkpoint(editable, session, folder)
    except OSError as error:
        assert error.errno == errno.ENOSPC
        assert resumable(folder)[0] == 4
    else:
        assert room >= 72
        assert resumable(folder) == [4, 8]
    assert not [name for name in names(folder) if name.startswith(".")]
    assert {name: (folder / name).read_bytes() for name in first} == first
    fresh = tiny_model("llama")
    for number in resumable(folder):  # whatever counts as resumable can be resumed
        again = tiny_model("llama")
        resume_from(hparams.editable(again), folder, number)
    assert resume_from(hparams.editable(fresh), folder, 4).num_edits == 4


def test_lines_are_added_whole_or_not_at_all(disk: Disk) -> None:
    run = RunDirectory(disk.folder / "run")
    run.append("metrics.jsonl", {"num_edits": 1})
    disk.leave(4096)
    with pytest.raises(OSError, match="No space left"):
        run.append("metrics.jsonl", {"num_edits": 2, "text": "x" * 50_000})
    disk.leave(100_000)
    run.append("metrics.jsonl", {"num_edits": 3})
    assert [line["num_edits"] for line in run.lines("metrics.jsonl")] == [1, 3]


def test_a_torn_line_is_not_written_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for torn in (b'{"num_edits": 1}\n{"num_ed', b'{"num', b"", b'{"num_edits": 1}\n' + b"x" * 200_000):
        (tmp_path / "metrics.jsonl").write_bytes(torn)
        run.append("metrics.jsonl", {"num_edits": 2})
        assert [line["num_edits"] for line in run.lines("metrics.jsonl")][-1] == 2


def test_statistics_without_room(disk: Disk, tok: PreTrainedTokenizerBase) -> None:
    hparams, model = tiny_hparams(disk.folder), tiny_model("llama")
    before = state_of(model)
    disk.leave(40_000)  # one layer's fits, two layers' do not
    with pytest.raises(ValueError, match=r"can't be written to .*stats_dir.*free disk space"):
        second_moments(hparams.editable(model), tok, hparams)
    assert unchanged(model, before)
    folder = next((disk.folder / "stats").rglob("*_stats"))
    assert all(not name.startswith(".") for name in names(folder))
    disk.leave(300_000)
    assert sorted(second_moments(hparams.editable(model), tok, hparams)) == hparams.layers


# --- folders that can't be written ---------------------------------------------------------------------------


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_a_read_only_folder_serves_what_it_has(disk: Disk, tok: PreTrainedTokenizerBase, base_alg: str,
                                               tmp_path: Path) -> None:
    hparams, model = tiny_hparams(disk.folder, base_alg=base_alg, v_num_grad_steps=1), tiny_model("llama")
    second_moments(hparams.editable(model), tok, hparams)
    disk.make_read_only()
    request = [{"prompt": "{} is in", "subject": "Rome", "target_new": "France"}]
    sphere.apply_sphere_to_model(model, tok, request, hparams)
    assert sphere.EditSession.of(model).num_edits == 1
    other, model = tiny_hparams(disk.folder, base_alg=base_alg, layers=[1, 3]), tiny_model("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match="set stats_dir to a writable folder"):
        sphere.apply_sphere_to_model(model, tok, request, other)
    assert unchanged(model, before)


def test_a_read_only_cache(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    data = disk.folder / "data"
    data.mkdir()
    (data / "zsre_mend_eval.json").write_text("[]")
    blob = hashlib.sha1(b"blob 2\0[]").hexdigest()
    monkeypatch.setattr("sphere_easyedit.datasets.downloads.PUBLISHED",
                        {"zsre": dataclasses.replace(PUBLISHED["zsre"], git_blob=blob)})
    disk.make_read_only()
    monkeypatch.setenv("SPHERE_CACHE", str(disk.folder))
    monkeypatch.delenv("SPHERE_DATA", raising=False)
    assert dataset_path("zsre") == data / "zsre_mend_eval.json"
    monkeypatch.setattr("sphere_easyedit.models.loading._smollm2_gguf", lambda: Path("some.gguf"))
    with pytest.raises(ValueError, match="set SPHERE_CACHE to a writable folder"):
        smollm2_folder()


# --- damaged checkpoints -------------------------------------------------------------------------------------


def damages(size: int, seed: int) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Bits flipped over the whole file, its header above all, and cuts."""
    drawn = random.Random(seed)
    for position in [*range(0, 64), *(drawn.randrange(size) for _ in range(150)), size - 1]:
        bit = 1 << drawn.randrange(8)
        yield f"bit at {position}", lambda raw, p=position, b=bit: raw[:p] + bytes([raw[p] ^ b]) + raw[p + 1:]
    for length in [0, 1, 7, 8, 9, size - 1, *(drawn.randrange(size) for _ in range(20))]:
        yield f"cut to {length}", lambda raw, n=length: raw[:n]
    yield "longer", lambda raw: raw + b"\0"


@pytest.mark.parametrize("file", [weights_path, session_path])
@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_damaged_checkpoint_is_refused_and_the_model_stays(
        tmp_path: Path, file: Callable[[Path, int], Path], with_checksum: bool) -> None:
    hparams, folder = tiny_hparams(tmp_path), tmp_path / "checkpoints"
    edited_state = state_of(checkpointed(folder, hparams, 4, 8))
    path = file(folder, 8)
    whole = path.read_bytes()
    if not with_checksum:  # of a run made before there were checksums: what is noticed is refused in the same way
        checksum_path(path).unlink()
    model = tiny_model("llama")
    editable, before = hparams.editable(model), state_of(model)
    noticed = 0
    for what, damage in damages(len(whole), 0):
        path.write_bytes(damage(whole))
        try:
            resume_from(editable, folder, 8)
        except ValueError as error:
            noticed += 1
            if with_checksum:
                assert path.name in str(error), what
                assert "remove it, and resume from the checkpoint before, after 4 edits" in str(error), what
            assert unchanged(model, before), what
        else:
            assert not with_checksum, what
            for layer in editable.layers:  # back to the unedited model for the next damage
                editable.set_weight(layer, before[editable.parameter_name(layer)])
    assert noticed > 60
    path.write_bytes(whole)
    resume_from(editable, folder, 8)
    assert unchanged(model, edited_state)


def test_the_advice_of_a_damaged_checkpoint_works(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=1)
    records = load_records("demo", None, 6, 0)
    measure = MeasureSettings(protocols=("paper",), before=False, after=False)

    def run(resume: bool) -> str:
        settings = RunSettings(tmp_path / "run", 2, measure=measure, checkpoint_every=2, keep_checkpoints=0,
                               resume=resume)
        return str(run_sequential(tiny_model("llama"), tok, records, hparams, settings).summary["weights_sha256"])

    whole = run(resume=False)
    (tmp_path / "run" / "summary.json").unlink()
    folder = tmp_path / "run" / "checkpoints"
    path = weights_path(folder, 6)
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ValueError, match=r"weights-6.*damaged.*remove it, and resume from .*after 4 edits"):
        run(resume=True)
    path.unlink()
    assert run(resume=True) == whole


def test_checkpoints_from_before_checksums_load_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                               ) -> None:
    hparams, folder = tiny_hparams(tmp_path), tmp_path / "checkpoints"
    edited = state_of(checkpointed(folder, hparams, 4))
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING):
        load_weights(hparams.editable(model), folder, 4)
        assert not caplog.records
        for path in (weights_path(folder, 4), session_path(folder, 4)):
            checksum_path(path).unlink()
        load_weights(hparams.editable(model), folder, 4)
    assert "no checksum" in caplog.text
    assert unchanged(model, edited)


def test_a_checksum_file_that_is_none(tmp_path: Path) -> None:
    hparams, folder = tiny_hparams(tmp_path), tmp_path / "checkpoints"
    checkpointed(folder, hparams, 4)
    for content in (b"", b"no checksum\n", b"\xff" * 64, b"0" * 63):
        checksum_path(weights_path(folder, 4)).write_bytes(content)
        with pytest.raises(ValueError, match=r"weights-4.safetensors.sha256"):
            load_weights(hparams.editable(tiny_model("llama")), folder, 4)


def test_checksums_are_sha256sums_and_go_with_their_files(tmp_path: Path) -> None:
    hparams, folder = tiny_hparams(tmp_path), tmp_path / "checkpoints"
    checkpointed(folder, hparams, 2, 4, 6)
    for path in folder.glob("*.sha256"):
        done = subprocess.run(["sha256sum", "-c", path.name], cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, path
    remove_old_checkpoints(folder, 1, {2})
    assert names(folder) == [f"{name}{end}" for name in (
        "session-6.safetensors", "weights-2.safetensors", "weights-6.safetensors") for end in ("", ".sha256")]


def test_no_stale_checksum_outlives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hparams, folder = tiny_hparams(tmp_path), tmp_path / "checkpoints"
    model = checkpointed(folder, hparams, 4)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    editable, session = hparams.editable(model), sphere.EditSession.of(model)
    editable.set_weight(1, editable.weight(1) * 2)
    monkeypatch.setattr(checkpoints, "record_checksum", killed)  # between a file and its checksum
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(editable, session, folder)
    monkeypatch.undo()
    again = tiny_model("llama")
    load_weights(hparams.editable(again), folder, 4)  # content of a new kind is not held against the old checksum
    assert torch.equal(hparams.editable(again).weight(1), editable.weight(1))


# --- killed processes, and several ---------------------------------------------------------------------------


def _die_while_writing(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def _in_a_child(work: Callable[..., None], *given: Any) -> int | None:
    child = FORK.Process(target=work, args=given)
    child.start()
    child.join(60)
    return child.exitcode


def test_what_a_killed_process_left_is_told_from_what_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(b"old")
    assert _in_a_child(_die_while_writing, path) == -signal.SIGKILL
    left = [name for name in names(tmp_path) if name != path.name]
    assert len(left) == 1
    assert path.read_bytes() == b"old"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        remove_partial_files(tmp_path)
        assert names(tmp_path) == sorted([temporary.name, path.name])
    assert path.read_bytes() == b"new"
    (tmp_path / ".hidden.npz").write_bytes(b"somebody's own")
    remove_partial_files(tmp_path)
    assert names(tmp_path) == [".hidden.npz", path.name]


def test_a_run_directory_is_cleared_of_leftovers(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for folder in (run.path, run.checkpoints):
        assert _in_a_child(_die_while_writing, folder / "weights-4.safetensors") == -signal.SIGKILL
        assert len(names(folder)) >= 1
    with run.locked():
        assert names(run.path) == ["checkpoints"]
        assert names(run.checkpoints) == []


def _hold(path: Path, held: Any) -> None:
    with locked(path, "nothing"):
        held.set()
        time.sleep(60)


def test_a_killed_holder_frees_its_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, held = tmp_path / "lock", FORK.Event()
    child = FORK.Process(target=_hold, args=(path, held))
    child.start()
    assert held.wait(30)
    timer = FORK.Process(target=_kill_later, args=(child.pid,))
    timer.start()
    with caplog.at_level(logging.INFO), locked(path, "sleeping"):
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
    timer.join(10)
    assert "another process is sleeping: waiting for it" in caplog.text
    assert names(tmp_path) == []


def _kill_later(process: int) -> None:
    time.sleep(0.3)
    os.kill(process, signal.SIGKILL)


def _count_up(path: Path, times: int) -> None:
    for _ in range(times):
        with locked(path.with_name("lock"), "counting"):
            found = int(path.read_text())
            time.sleep(0.0002)
            path.write_text(str(found + 1))


def test_the_lock_excludes(tmp_path: Path) -> None:
    """Also while holders remove the lock file under those who wait for it."""
    path = tmp_path / "count"
    path.write_text("0")
    children = [FORK.Process(target=_count_up, args=(path, 100)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert path.read_text() == "400"


def _collect_in_child(hparams: sphere.SPHEREHyperParams, tok: PreTrainedTokenizerBase, log: Path, result: Path,
                      dies: bool) -> None:
    original, save = covariance._collect, covariance.save_moment

    def noted(*given: Any) -> None:
        with log.open("a") as stream:
            stream.write("collected\n")
        time.sleep(0.3)
        original(*given)

    def die(path: Path, *given: Any) -> None:
        if path.name.startswith("model.layers.2"):  # the first layer's is filed
            _die_while_writing(path)
        save(path, *given)

    covariance._collect = noted
    if dies:
        covariance.save_moment = die
    moments = second_moments(hparams.editable(tiny_model("llama")), tok, hparams)
    torch.save(moments, result)


def test_processes_at_once_collect_statistics_once(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams, log = tiny_hparams(tmp_path), tmp_path / "log"
    children = [FORK.Process(target=_collect_in_child, args=(hparams, tok, log, tmp_path / f"{number}.pt", False))
                for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert log.read_text() == "collected\n"
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(3)]
    assert all(torch.equal(one[layer], found[0][layer]) for one in found for layer in hparams.layers)


def test_statistics_of_a_killed_process_are_finished_by_the_next(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams, whole = tiny_hparams(tmp_path), tiny_hparams(tmp_path / "whole")
    given = (hparams, tok, tmp_path / "log", tmp_path / "result.pt")
    assert _in_a_child(_collect_in_child, *given, True) == -signal.SIGKILL
    folder = next((tmp_path / "stats").rglob("*_stats"))
    # The first layer's with its fingerprint, half of the second's, and the lock that nobody holds.
    assert len(names(folder)) == 4
    editable = hparams.editable(tiny_model("llama"))
    expected = second_moments(whole.editable(tiny_model("llama")), tok, whole)
    assert all(torch.equal(moment, expected[layer]) for layer, moment in second_moments(editable, tok, hparams).items())
    paths = [file.path for file in statistics_files(editable, tok, hparams).values()]
    assert names(folder) == sorted(path.name for path in [*paths, *map(fingerprint_path, paths)])


# --- the clock -----------------------------------------------------------------------------------------------


def test_nothing_reads_the_wall_clock_but_for_people() -> None:
    """Durations are of clocks that never go back; no file is trusted for its date."""
    wanting = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                if (owner, node.attr) == ("time", "time") or node.attr in ("st_mtime", "st_mtime_ns", "st_ctime",
                                                                           "getmtime", "utcnow"):
                    wanting.append(f"{path.name}:{node.lineno}")
                if node.attr in ("now", "today") and path.name != "process.py":  # a date on top of a log
                    wanting.append(f"{path.name}:{node.lineno}")
    assert wanting == []


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, tok: PreTrainedTokenizerBase,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=1)
    records = load_records("demo", None, 4, 0)

    def run(name: str) -> dict[str, Any]:
        settings = RunSettings(tmp_path / name, 2, measure=MeasureSettings(protocols=("paper",), before=False),
                               checkpoint_every=2)
        return run_sequential(tiny_model("llama"), tok, records, hparams, settings).summary

    forwards = run("forwards")
    start = [time.time()]

    def backwards() -> float:
        start[0] -= 3600.0
        return start[0]

    monkeypatch.setattr(time, "time", backwards)
    back = run("back")
    monkeypatch.undo()
    assert back["weights_sha256"] == forwards["weights_sha256"]
    assert back["post"] == forwards["post"]
    assert back["editing_seconds"] > 0 and back["evaluation_seconds"] > 0
    lines = [json.loads(line) for line in (tmp_path / "back" / "edits.jsonl").read_text().splitlines()]
    assert all(seconds >= 0 for line in lines for seconds in line["seconds"].values())
