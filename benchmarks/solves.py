"""A batch's closed-form solve against the dense one that EasyEdit does, and what each keeps in memory.

The dense solves are written here, as EasyEdit's code does them: AlphaEdit in float32 with P0 and the sum of earlier
keys' outer products as d_in x d_in matrices and the residuals on the right-hand side, MEMIT in float64 with lambda C
(and, to compare like with like, the same sum). Ours is timed with everything a batch asks of it: solving, multiplying
out dW, and taking the batch's keys into the history. Both take turns on the same synthetic keys, whose second moment
falls off like that of SmolLM2-135M's keys (norm about 5; eigenvalues 0.7 down to 0.003 of 1,536).

    python benchmarks/solves.py --d-in 1536 4096
    python benchmarks/solves.py --d-in 14336 --d-out 4096 --method AlphaEdit --pairs 1    # minutes, 8 GB
    python benchmarks/solves.py --d-in 14336 --d-out 4096 --method AlphaEdit --pairs 0    # ours and its state alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import scipy.fft
import torch
from torch import Tensor

from common import machine, peak_memory, spread
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    KeyMetric,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
)

L2, LAMBDA = 10.0, 15000.0
# The dense float64 solve that both are compared with takes minutes above it.
EXACT_UP_TO = 4096


class SyntheticKeys:
    """Keys with a given spectrum in a random orthonormal basis, which a cosine transform applies without storing it."""

    def __init__(self, d_in: int, seed: int = 0) -> None:
        self.d_in, self._generator = d_in, torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (d_in, 1), generator=self._generator).double() * 2 - 1
        falling = torch.arange(1, d_in + 1, dtype=torch.float64) ** -0.6
        self._spectrum = (25 * falling / falling.sum())[:, None]  # largest first

    def _rotated(self, coordinates: Tensor) -> Tensor:
        rotated: Tensor = torch.from_numpy(scipy.fft.idct(coordinates.numpy(), axis=0, norm="ortho"))
        return self._signs * rotated

    def draw(self, count: int) -> Tensor:
        """``(d_in, count)`` float32."""
        normal = torch.randn(self.d_in, count, generator=self._generator, dtype=torch.float64)
        return self._rotated(self._spectrum.sqrt() * normal).float()

    def directions(self, first: int, last: int) -> Tensor:
        """Eigenvectors ``(d_in, last - first)`` float64, those of the largest eigenvalues first."""
        return self._rotated(torch.eye(self.d_in, dtype=torch.float64)[:, first:last])

    def moment(self) -> Tensor:
        """C ``(d_in, d_in)`` float32, by blocks of columns: all at once would take five times its memory in float64."""
        moment = torch.empty(self.d_in, self.d_in)
        for start in range(0, self.d_in, 1024):
            columns = torch.zeros(self.d_in, min(1024, self.d_in - start), dtype=torch.float64)
            columns[start: start + columns.shape[1]].fill_diagonal_(1.0)
            coordinates = torch.from_numpy(scipy.fft.dct((self._signs * columns).numpy(), axis=0, norm="ortho"))
            moment[:, start: start + columns.shape[1]] = self._rotated(self._spectrum * coordinates).float()
        return moment


def dense_alphaedit(projection: Tensor, earlier: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
    """EasyEdit's AlphaEdit: the transposed update ``(d_in, d_out)``, in the dtype of its arguments."""
    system = projection @ (keys @ keys.T + earlier) + L2 * torch.eye(len(keys), dtype=keys.dtype)
    solved: Tensor = torch.linalg.solve(system, projection @ keys @ residuals.T)
    return solved


def dense_memit(moment: Tensor, earlier: Tensor, keys: Tensor, residuals: Tensor) -> Tensor:
    """EasyEdit's MEMIT with earlier keys in the bracket: the transposed update ``(d_in, d_out)`` float64."""
    keys = keys.double()
    adjusted: Tensor = torch.linalg.solve(LAMBDA * moment.double() + earlier + keys @ keys.T, keys)
    return adjusted @ residuals.double().T


@dataclass(frozen=True)
class Case:
    """One method at one width: its metric, and the dense solve of keys and residuals with a given dtype."""

    metric: KeyMetric
    dense: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    dense_dtype: torch.dtype
    dense_bytes: int  # kept by EasyEdit for a layer


def make_case(method: str, synthetic: SyntheticKeys, share: float, with_dense: bool) -> Case:
    d_in = synthetic.d_in
    square = torch.zeros(0)
    if method == "MEMIT":
        square = synthetic.moment()
        started = time.perf_counter()
        metric: KeyMetric = CovarianceMetric(CholeskyFactor.of(square), LAMBDA)
        print(f"(Cholesky factor of C at {d_in}: {time.perf_counter() - started:.1f} s, once a session)")

        def dense(earlier: Tensor, keys: Tensor, residuals: Tensor, _dtype: torch.dtype) -> Tensor:
            return dense_memit(square, earlier, keys, residuals)

        return Case(metric, dense, torch.float64, 2 * 4 * d_in**2)
    left_out = d_in - int(share * d_in)
    if left_out < d_in / 2:
        space = NullSpace(synthetic.directions(0, left_out).float(), complement=True)
    else:
        space = NullSpace(synthetic.directions(left_out, d_in).float())
    if with_dense:
        removed = synthetic.directions(0, left_out)
        square = (torch.eye(d_in) - (removed.float() @ removed.float().T if d_in > EXACT_UP_TO
                                     else removed @ removed.T))

    def projected(earlier: Tensor, keys: Tensor, residuals: Tensor, dtype: torch.dtype) -> Tensor:
        return dense_alphaedit(square.to(dtype), earlier.to(dtype), keys.to(dtype), residuals.to(dtype))

    return Case(NullSpaceMetric(space, L2), projected, torch.float32, 2 * 4 * d_in**2)


def ours(history: KeyHistory, keys: Tensor, residuals: Tensor) -> tuple[Tensor, KeyHistory]:
    """The update ``(d_out, d_in)`` and the history with this batch's keys."""
    adjusted = adjusted_keys(history, keys)
    if adjusted is None:
        raise SystemExit("the factored solve failed")
    return residuals @ adjusted.float().T, history.extended(keys)


def relative_difference(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def measure(method: str, d_in: int, options: argparse.Namespace) -> str:
    """One row of the table."""
    synthetic = SyntheticKeys(d_in)
    case = make_case(method, synthetic, options.share, options.pairs > 0)
    old, keys = synthetic.draw(options.earlier), synthetic.draw(options.batch)
    residuals = torch.randn(options.d_out or max(512, d_in // 4), options.batch)
    started = time.perf_counter()
    history = KeyHistory(old, case.metric)
    rebuilt = time.perf_counter() - started
    earlier = torch.zeros(0)
    if options.pairs:
        # The sum of earlier outer products is kept from batch to batch, and takes the batch's own in turn.
        earlier = (old.to(case.dense_dtype) @ old.T.to(case.dense_dtype))
        if case.dense_dtype == torch.float32 and d_in <= EXACT_UP_TO:
            earlier = old.double() @ old.T.double()
    seconds, dense_seconds, difference = [], [], float("nan")
    ours(history, keys, residuals)  # the first call of all also sets up threads and buffers
    for _ in range(max(1, options.pairs)):
        started = time.perf_counter()
        update, _ = ours(history, keys, residuals)
        seconds.append(time.perf_counter() - started)
        if options.pairs:
            kept = earlier.to(case.dense_dtype)
            started = time.perf_counter()
            dense = case.dense(kept, keys, residuals, case.dense_dtype)
            kept = kept + (keys @ keys.T).to(kept.dtype)
            dense_seconds.append(time.perf_counter() - started)
            difference = relative_difference(update, dense.T)
            del dense, kept
    exact = float("nan")
    if options.pairs and d_in <= EXACT_UP_TO:
        exact = relative_difference(update, case.dense(earlier, keys, residuals, torch.float64).T)
    ratios = [dense / own for dense, own in zip(dense_seconds, seconds, strict=False)]
    parts = {"metric": case.metric.nbytes, "keys": history.keys.nbytes,
             "factor": 0 if history.factor is None else history.factor.nbytes}
    print(f"{method} at {d_in}: state of a layer in MB: " + ", ".join(f"{k} {v / 1e6:.1f}" for k, v in parts.items())
          + f"; rebuilding the history {rebuilt:.2f} s", flush=True)
    return " | ".join([
        f"| {method}", f"{d_in}", spread(seconds, 3), spread(dense_seconds, 2) if dense_seconds else "-",
        spread(ratios, 1) if ratios else "-", f"{exact:.0e}", f"{difference:.0e}",
        f"{options.layers * history.nbytes / 1e9:.3f}", f"{options.layers * case.dense_bytes / 1e9:.3f}",
        f"{options.layers * 4 * d_in * len(residuals) / 1e9:.3f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, nargs="+", default=[1536, 4096])
    parser.add_argument("--d-out", type=int, help="rows of the weight; a quarter of d_in by default")
    parser.add_argument("--method", choices=("AlphaEdit", "MEMIT"), nargs="+", default=["AlphaEdit", "MEMIT"])
    parser.add_argument("--earlier", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--share", type=float, default=0.9, help="of the dimensions, in AlphaEdit's null space")
    parser.add_argument("--layers", type=int, default=5, help="counted in the state's bytes")
    parser.add_argument("--pairs", type=int, default=5, help="turns of both; 0: ours alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(method, d_in, options) for d_in in options.d_in for method in options.method]
    print(f"\n{machine()}; {peak_memory()}; batch of "
          f"{options.batch} after {options.earlier} earlier edits, null space {options.share:.0%}; median (range) of "
          f"{max(1, options.pairs)}.\nState is what ours keeps for {options.layers} layers: P0 or C's factor, keys, "
          "the system's factor. Dense state is P0 or C and\nthe sum of outer products, float32. The session's copy of "
          "original weights comes on top in float32 (last column).\n")
    print("| method | d_in | ours, s | dense, s | ratio | difference to dense float64 | to dense as EasyEdit's "
          "| state, GB | dense state, GB | originals, GB |\n" + "| --- " * 10 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
