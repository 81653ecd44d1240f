"""Base class of the locate-then-edit methods that SPHERE can be applied to.

To add a method, subclass MEMIT or AlphaEdit (or ``Method``, for another way to weigh keys), set ``name``, override what
differs, and register the class. ``base_alg: ScaledMEMIT`` then selects this one::

    class ScaledMEMIT(MEMIT):
        name = "ScaledMEMIT"
        default_alpha = 0.5

        def restrain(self, update, weight, hparams):
            return scaled(update, 0.9)  # core.suppression.scaled

    sphere_easyedit.register_method(ScaledMEMIT)

One batch uses a method in this order:

1. ``needs_statistics`` and ``key_metrics``, before a session's first batch: derive from the second moments of keys how
   each layer's keys are weighed.
2. The solve, for each layer: ``dW = R (adjusted keys)^T`` (see ``solvers``). ``solve_densely`` is its fallback. Earlier
   batches' keys count if ``keeps_keys``.
3. ``restrain`` changes each layer's update, then SPHERE projects it.
4. ``restrain_whole_change`` changes the weights that are evaluated and saved, then SPHERE projects them; only if
   ``restrains_whole_change``, and instead of step 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..core.updates import Update
from ..models.architecture import EditableModel
from .solvers import KeyHistory, KeyMetric
from .statistics_fingerprint import StatisticsFile
from .tensor_store import TensorStore

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams


class Method(ABC):
    """A locate-then-edit method ``dW = R (adjusted keys)^T``. Instances have no state.

    Attributes:
        name: value of ``base_alg`` that selects the method.
        default_alpha: default of ``alpha``.
        default_stage: default of ``projection_stage``.
        required: hyperparameters that must be given besides the optimiser's; one of each group.
        always_keeps_keys: earlier keys count in every solve, whatever ``keep_previous_keys`` says.
        uses_null_space: keys are weighed by a null-space projection, not by their covariance.
        is_low_rank: every change is ``R K^T``, so Gram matrices are kept from batch to batch. Set it to False if
            ``restrain`` or ``restrain_whole_change`` returns dense changes.
        restrains_whole_change: ``restrain_whole_change`` is called.
        fine_tunes: the weights are trained by gradient descent (see ``editing.fine_tuning``) in place of step 2.
        offered_to_easyedit: EasyEdit lacks the method, so ``register`` adds it there, without SPHERE.
        reads_target_values: EasyEdit's function of this name can read our target values from its cache files.
        starting_values: its hyperparameters in a starting file (``sphere-easyedit hparams``).
    """

    name: str
    default_alpha: ClassVar[float] = 0.8
    default_stage: ClassVar[str] = "update"
    required: ClassVar[tuple[tuple[str, ...], ...]] = ()
    always_keeps_keys: ClassVar[bool] = False
    uses_null_space: ClassVar[bool] = False
    is_low_rank: ClassVar[bool] = True
    restrains_whole_change: ClassVar[bool] = False
    fine_tunes: ClassVar[bool] = False
    offered_to_easyedit: ClassVar[bool] = False
    reads_target_values: ClassVar[bool] = False
    starting_values: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    def default_principal_space(self) -> str:
        """Default of ``principal_space``."""
        return "pretrained" if self.restrains_whole_change else "current"

    def missing(self, hparams: SPHEREHyperParams) -> list[str]:
        """Required hyperparameters that are missing, with alternatives in brackets."""
        groups = [group for group in self.required if all(getattr(hparams, name) is None for name in group)]
        return [first + (f" (or {', '.join(others)})" if others else "") for first, *others in groups]

    def keeps_keys(self, hparams: SPHEREHyperParams) -> bool:
        """Whether earlier batches' keys count in a solve."""
        return self.always_keeps_keys or bool(hparams.keep_previous_keys)

    def needs_statistics(self, hparams: SPHEREHyperParams) -> bool:
        """Whether ``key_metrics`` needs the second moments of keys."""
        return True

    @abstractmethod
    def key_metrics(self, editable: EditableModel, hparams: SPHEREHyperParams,
                    statistics: Mapping[int, StatisticsFile], store: TensorStore) -> dict[int, KeyMetric | None]:
        """How keys are weighed, by layer; None for a layer to solve by ``solve_densely``.

        Args:
            statistics: files with the second moments of keys, by layer; empty unless ``needs_statistics``.
            store: where to keep large tensors.

        Raises:
            ValueError: a file does not fit the model.
        """

    @abstractmethod
    def solve_densely(self, metric: KeyMetric | None, moment: Callable[[], Tensor], keys: Tensor, history: KeyHistory,
                      hparams: SPHEREHyperParams) -> Tensor:
        """Adjusted keys ``(d_in, n)`` by the plain closed form in the space of d_in, where the solve in the space of
        keys fails.

        Args:
            metric: the layer's metric from ``key_metrics``.
            moment: reads the second moment of the layer's keys ``(d_in, d_in)`` float32, on the keys' device.
            keys: the batch's keys ``(d_in, n)``.
            history: earlier keys.

        Raises:
            torch.linalg.LinAlgError: the system is singular.
        """

    def restrain(self, update: Update, weight: Tensor, hparams: SPHEREHyperParams) -> Update:
        """Restrain one layer's update, before SPHERE projects it; by default the update is returned unchanged.

        Args:
            update: ``LowRankUpdate``, or dense ``(d_out, d_in)`` (``core.updates.dense`` converts either).
            weight: ``(d_out, d_in)`` before the update.
        """
        return update

    def restrain_whole_change(self, change: Tensor, original: Tensor, hparams: SPHEREHyperParams) -> Tensor:
        """Restrain the whole change since the pretrained weight, in the weights that are evaluated and saved.

        The next batch starts from the unrestrained weights. Called only if ``restrains_whole_change``.

        Args:
            change: ``W - W0`` ``(d_out, d_in)``.
            original: W0.
        """
        return change


class _WithoutKeys(Method):
    """A method that does not solve for the weights from keys, so that SPHERE sees just its updates."""

    def key_metrics(self, *_: Any, **__: Any) -> dict[int, KeyMetric | None]:
        raise NotImplementedError(f"{self.name} weighs no keys")

    def solve_densely(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError(f"{self.name} weighs no keys")


class FineTuningMethod(_WithoutKeys):
    """A method that trains the edited weights natively."""

    fine_tunes: ClassVar[bool] = True
    is_low_rank: ClassVar[bool] = False
    default_alpha: ClassVar[float] = 0.0
    required: ClassVar[tuple[tuple[str, ...], ...]] = (("ft_lr",), ("ft_epochs",), ("kl_factor",))


class WrappedMethod(_WithoutKeys):
    """A method that only EasyEdit implements."""

    def __init__(self, name: str) -> None:
        self.name = name
