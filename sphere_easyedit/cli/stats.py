"""``stats``: collect the second moments of keys."""

from __future__ import annotations

from .common import load_replicas, set_up
from .options import MethodOptions, Verbose, with_option_groups


@with_option_groups
def stats(method: MethodOptions, verbose: Verbose = False) -> None:
    """Collect the second moments of keys that MEMIT and AlphaEdit need, once for all runs."""
    consoles = set_up(verbose)
    from ..methods.covariance import moment_path, second_moments

    hparams = method.load()
    model, tok, leading = load_replicas(hparams, method.dtype)
    editable = hparams.editable(model)
    with leading:
        second_moments(editable, tok, hparams)
    for layer in hparams.layers:
        consoles.print_line(str(moment_path(editable, hparams, layer)))
