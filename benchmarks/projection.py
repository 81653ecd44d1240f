"""Time and memory of projecting an update and of hyperspherical energy, with the differences that shortcuts make.

Random weights scaled like a language model's are edited by random low-rank updates, batch after batch, as a run with
``principal_space: current`` does it: the Gram matrix of the weight is computed once and carried. The reference is
written here from the mathematics: eigenvectors of the ``d_in x d_in`` matrix, and a dense P. It takes most of a minute
at 2048 x 8192 and is left out elsewhere unless asked for.

    python benchmarks/projection.py
    python benchmarks/projection.py --sizes 512x2048 --references 512x2048 --batches 3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from common import machine
from sphere_easyedit import PrincipalSpace, hyperspherical_energy
from sphere_easyedit.core.hyperspherical import energy_from_gram
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.editing.gram_matrices import GramMatrix

Size = tuple[int, int]
Result = TypeVar("Result")
GAMMA, ALPHA = 0.5, 0.8


class Stopwatch:
    """Seconds by name, one for each time that something was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[..., Result], *args: Any) -> Result:
        started = time.perf_counter()
        result = work(*args)
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def random_weight(size: Size) -> Tensor:
    """``(d_out, d_in)`` with entries of standard deviation 0.02, as LLMs are initialised, made in place."""
    return torch.empty(size).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))


def random_updates(weight: Tensor, keys: int, count: int, relative_norm: float) -> list[LowRankUpdate]:
    """Updates ``R K^T`` of a given Frobenius norm relative to the weight's."""
    generator = torch.Generator().manual_seed(1)
    updates = []
    for _ in range(count):
        columns = torch.randn(weight.shape[1], keys, generator=generator)
        values = torch.randn(weight.shape[0], keys, generator=generator)
        norm = ((values.T @ values) * (columns.T @ columns)).sum().sqrt()  # of R K^T, which is not formed
        updates.append(LowRankUpdate(values * (relative_norm * weight.norm() / norm), columns))
    return updates


def reference_projection(weight: Tensor, update: Tensor) -> Tensor:
    """``dW (I - alpha U U^T)`` by the definition."""
    unit = weight / weight.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values.cumsum(0) / values.sum() <= GAMMA).sum()) + 1
    principal = vectors[:, :rank]
    projection = torch.eye(weight.shape[1]) - ALPHA * principal @ principal.T
    projected: Tensor = update @ projection
    return projected


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def current_batch(weight: Tensor, gram: GramMatrix | None, rank: int | None, update: LowRankUpdate
                  ) -> tuple[LowRankUpdate, GramMatrix | None, int]:
    """The projected update, the Gram matrix after it, and the rank of the space."""
    gram = GramMatrix.of(weight) if gram is None else gram
    space = PrincipalSpace.from_gram(weight, gram.matrix, GAMMA, rank)
    projected = LowRankUpdate(update.values, space.suppress_keys(update.keys, ALPHA))
    return projected, gram.after(weight, projected), space.rank


def carried_energy(weight: Tensor, gram: Tensor) -> Tensor:
    return energy_from_gram(gram, weight=weight)


def pretrained_space(weight: Tensor) -> PrincipalSpace:
    space = PrincipalSpace.from_weight(weight, GAMMA)
    space.directions  # noqa: B018 - formed when first read
    return space


def energy_memory(size: Size) -> int:
    """What HE from scratch adds to the peak resident set, in bytes; to be run in a process of its own, on Linux."""
    weight = random_weight(size)
    before = resident_bytes("VmRSS")
    hyperspherical_energy(weight)
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str) -> int:
    """A line of ``/proc/self/status``; ``ru_maxrss`` would also count what the parent process held."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def measure(size: Size, keys: int, batches: int, relative_norm: float, with_reference: bool) -> dict[str, Any]:
    """All figures of one size: seconds of each repetition, and the differences."""
    watch = Stopwatch()
    weight = random_weight(size)
    updates = random_updates(weight, keys, batches + 1, relative_norm)
    torch.mm(weight[:256], weight[:256].T)  # threads are started
    figures: dict[str, Any] = {"size": list(size), "keys": keys}

    for _ in range(2):
        start = float(watch("HE", hyperspherical_energy, weight))
        unit = weight / weight.norm(dim=1, keepdim=True)
        watch("What What^T", torch.mm, unit, unit.T)

    space = watch("pretrained first", pretrained_space, weight)
    for update in updates:
        kept = watch("pretrained later", space.suppress_keys, update.keys, ALPHA)
    figures["rank"] = space.rank

    if with_reference:
        expected = watch("reference", reference_projection, weight, updates[-1].dense())
        figures["update against reference"] = relative_error(updates[-1].values @ kept.T, expected)

    gram: GramMatrix | None = None
    rank: int | None = None
    for number, update in enumerate(updates):
        name = "current later" if number else "current first"
        projected, gram, rank = watch(name, current_batch, weight, gram, rank, update)
        weight = weight + projected.dense()
        assert gram is not None
        matrix = gram.matrix
        energy = float(watch("HE from G", carried_energy, weight, matrix))
    fresh = GramMatrix.of(weight).matrix
    unedited = random_weight(size)
    start_by_gram = float(carried_energy(unedited, GramMatrix.of(unedited).matrix))
    direct = float(hyperspherical_energy(weight))
    spaces = [PrincipalSpace.from_gram(weight, matrix, GAMMA), PrincipalSpace.from_weight(weight, GAMMA)]
    carried, scratch = (one.suppress_keys(updates[0].keys, ALPHA) for one in spaces)
    figures |= {
        "G carried against fresh": relative_error(matrix, fresh),
        "keys by carried G against from scratch": relative_error(carried, scratch),
        "ranks": [one.rank for one in spaces],
        "HE change": (direct - start) / start,
        "HE change by carried G": (energy - start_by_gram) / start_by_gram,
        "seconds": watch.seconds,
    }
    median = {name: watch.median(name) for name in watch.seconds}
    if with_reference:
        figures["times faster than the reference"] = {
            name: median["reference"] / median[name]
            for name in ("current first", "current later", "pretrained first", "pretrained later")}
    figures["HE over What What^T"] = median["HE"] / median["What What^T"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        figures["HE extra megabytes"] = pool.submit(energy_memory, size).result() / 1e6
    return figures


def print_table(figures: dict[str, Any]) -> None:
    d_out, d_in = figures["size"]
    print(f"\n{d_out} x {d_in}, {figures['keys']} keys, rank {figures['rank']}")
    print(f"  {'':<24}{'seconds: median':>16}{'least':>9}{'times':>7}{'faster than the reference':>28}")
    faster = figures.get("times faster than the reference", {})
    for name, seconds in figures["seconds"].items():
        ratio = f"{faster[name]:.0f}" if name in faster else ""
        print(f"  {name:<24}{statistics.median(seconds):>16.3f}{min(seconds):>9.3f}{len(seconds):>7}{ratio:>28}")
    print(f"  HE takes {figures['HE over What What^T']:.2f} times one What What^T and "
          f"{figures['HE extra megabytes']:.0f} MB more")
    if "update against reference" in figures:
        print(f"  the projected update differs from the reference's by {figures['update against reference']:.1e}")
    print(f"  after all batches G carried differs from a fresh one by {figures['G carried against fresh']:.1e}, keys "
          f"projected by it by {figures['keys by carried G against from scratch']:.1e}, ranks {figures['ranks']}")
    print(f"  HE / HE_0 - 1 is {figures['HE change']:.5e} from scratch, {figures['HE change by carried G']:.5e} by "
          "carried G", flush=True)


def parsed_size(text: str) -> Size:
    d_out, d_in = (int(side) for side in text.split("x"))
    return d_out, d_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=parsed_size, default=[(2048, 8192), (4096, 14336)], metavar="OxI",
                        help="d_out x d_in of the weights (2048x8192 4096x14336)")
    parser.add_argument("--references", nargs="*", type=parsed_size, default=[(2048, 8192)], metavar="OxI",
                        help="sizes at which to run the reference too (2048x8192); none: leave it out")
    parser.add_argument("--keys", type=int, default=100, help="edits in a batch")
    parser.add_argument("--batches", type=int, default=3, help="later batches")
    parser.add_argument("--relative-norm", type=float, default=3e-3, help="of an update, to the weight")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    found = []
    print(f"{machine()}, gamma {GAMMA}, alpha {ALPHA}")
    for size in args.sizes:
        found.append(measure(size, args.keys, args.batches, args.relative_norm, size in args.references))
        print_table(found[-1])
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
