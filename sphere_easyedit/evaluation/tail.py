"""Following a run directory while the run writes it: what is new since one looked last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..energy_metrics import EnergyRecord
from .run_directory import EDITS, ENERGY, METRICS, RunDirectory, parse_line


@dataclass(frozen=True)
class News:
    """What a run has written since the last look.

    Attributes:
        batches: new lines of ``edits.jsonl``.
        points: new lines of ``metrics.jsonl``.
        energy: the newest record of ``energy.csv``, new or not; None while there is none.
    """

    batches: tuple[dict[str, Any], ...]
    points: tuple[dict[str, Any], ...]
    energy: EnergyRecord | None


class RunTail:
    """Follows the growing files of a run directory, at the cost of what is new.

    A resumed run drops lines and writes them again. What still stands is then not told once more, and what was written
    again is: it is news. A last line that is still being written waits until it is whole.

    Args:
        path: the run directory; need not be there yet.

    Raises:
        ValueError: one of the files leads out of the directory.

    Attributes:
        energy: all records of ``energy.csv`` as of the last look, by number of edits. Those of the batches told are
            among them.
    """

    def __init__(self, path: Path) -> None:
        place = RunDirectory(path).place
        self._edits, self._metrics, self._energy_file = (_GrowingFile(place(name)) for name in (EDITS, METRICS, ENERGY))
        self.energy: dict[int, EnergyRecord] = {}

    def poll(self) -> News:
        """What is new; at the first call everything.

        Raises:
            ValueError: a new line is not of its file's form; the next call goes on behind what was read.
        """
        # A batch's energy is written before its line, so it is read after it.
        batches, points = self._edits.look(), self._metrics.look()
        energy = self._energy_file.look()
        if energy.anew:
            self.energy = {}
        for number, text in energy.standing if energy.anew else energy.new:
            self._add_energy(number, text)
        newest = self.energy[max(self.energy)] if self.energy else None
        return News(tuple(self._edits.parsed(batches.new)), tuple(self._metrics.parsed(points.new)), newest)

    def _add_energy(self, number: int, text: bytes) -> None:
        if number == 1:  # the heading
            return
        try:
            num_edits, layer, energy, change = text.decode().split(",")
            record = self.energy.setdefault(int(num_edits), EnergyRecord(int(num_edits), {}, {}))
            record.energy[int(layer)], record.relative_change[int(layer)] = float(energy), float(change)
        except ValueError as error:
            raise ValueError(f"{self._energy_file.path}, line {number} is no record of energy ({error}): it was "
                             "damaged") from error


_Numbered = tuple[int, bytes]  # a line with its number


@dataclass(frozen=True)
class _Look:
    new: list[_Numbered]
    standing: list[_Numbered]  # all lines, where the file was read anew
    anew: bool


class _GrowingFile:
    """Whole lines of a file that grows, and is now and then replaced by a shorter one and grows again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()
        self._told: set[int] = set()  # hashes of the lines told that still stand

    def _start_over(self) -> None:
        self._offset, self._count, self._last = 0, 0, b""

    def look(self) -> _Look:
        try:
            with self.path.open("rb") as stream:
                # Where the line read last still ends where it ended, what precedes it is as it was.
                stream.seek(self._offset - len(self._last))
                anew = self._offset == 0 or stream.read(len(self._last)) != self._last
                if anew:
                    self._start_over()
                    stream.seek(0)
                fresh = stream.read()
        except FileNotFoundError:
            self._start_over()
            self._told = set()
            return _Look([], [], anew=True)
        fresh = fresh[: fresh.rfind(b"\n") + 1]
        lines = fresh.splitlines(keepends=True)
        numbered = list(enumerate(lines, start=self._count + 1))
        hashes = [hash(line) for line in lines]
        new = [one for one, its_hash in zip(numbered, hashes, strict=True) if not anew or its_hash not in self._told]
        self._told = set(hashes) if anew else self._told.union(hashes)
        self._offset += len(fresh)
        self._count += len(lines)
        self._last = lines[-1] if lines else self._last
        return _Look(new, numbered if anew else [], anew)

    def parsed(self, lines: list[_Numbered]) -> list[dict[str, Any]]:
        """Lines of JSON as objects."""
        return [parse_line(self.path, number, text) for number, text in lines]
