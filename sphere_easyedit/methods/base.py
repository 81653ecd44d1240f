"""What a base method is: the class to subclass for a method of one's own."""

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
    """A locate-then-edit method ``dW = R (adjusted keys)^T`` that SPHERE can be put on top of.

    Subclass it (or MEMIT or AlphaEdit, which differ in how they weigh keys), set what differs and register the class
    with ``sphere_easyedit.register_method``; hyperparameters then select it by ``base_alg``. Instances have no state.

    Attributes:
        name: value of ``base_alg``.
        default_alpha: alpha where hyperparameters give none.
        default_stage: ``projection_stage`` where they give none.
        required: hyperparameters it needs besides the optimiser's; of each group one must be given.
        always_keeps_keys: earlier keys count in every solve, whatever ``keep_previous_keys`` says.
        uses_null_space: keys are weighed by a null-space projection rather than by their covariance.
        is_low_rank: weights change by ``R K^T`` alone, so that Gram matrices can be carried from batch to batch. False
            where ``restrain`` or ``restrain_whole_change`` gives dense changes.
        restrains_whole_change: ``restrain_whole_change`` shapes the weights that are evaluated and saved.
        edits_as: the method whose weights it edits on with, if those that are evaluated are all that differs from it.
        offered_to_easyedit: EasyEdit lacks it, so ``register`` gives it to EasyEdit under its own name, without SPHERE.
        reads_target_values: EasyEdit's function of this name reads target values, optimised as ours are, from files.
        starting_values: its hyperparameters in a starting file.
    """

    name: str
    default_alpha: ClassVar[float] = 0.8
    default_stage: ClassVar[str] = "update"
    required: ClassVar[tuple[tuple[str, ...], ...]] = ()
    always_keeps_keys: ClassVar[bool] = False
    uses_null_space: ClassVar[bool] = False
    is_low_rank: ClassVar[bool] = True
    restrains_whole_change: ClassVar[bool] = False
    edits_as: ClassVar[str | None] = None
    offered_to_easyedit: ClassVar[bool] = False
    reads_target_values: ClassVar[bool] = False
    starting_values: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    def default_principal_space(self) -> str:
        """``principal_space`` where hyperparameters give none."""
        return "pretrained" if self.restrains_whole_change else "current"

    def missing(self, hparams: SPHEREHyperParams) -> list[str]:
        """Required hyperparameters that are not given, alternatives in brackets."""
        groups = [group for group in self.required if all(getattr(hparams, name) is None for name in group)]
        return [first + (f" (or {', '.join(others)})" if others else "") for first, *others in groups]

    def keeps_keys(self, hparams: SPHEREHyperParams) -> bool:
        """Whether earlier batches' keys count in a solve."""
        return self.always_keeps_keys or bool(hparams.keep_previous_keys)

    def needs_statistics(self, hparams: SPHEREHyperParams) -> bool:
        """Whether the second moments of keys must be collected."""
        return True

    @abstractmethod
    def key_metrics(self, editable: EditableModel, hparams: SPHEREHyperParams,
                    statistics: Mapping[int, StatisticsFile], store: TensorStore) -> dict[int, KeyMetric | None]:
        """How keys are weighed, by layer; None for a layer whose batches are to be solved densely.

        Args:
            statistics: files with the second moments of keys, by layer; empty where none are needed.
            store: where what is derived from them is kept.

        Raises:
            ValueError: a file does not fit the model.
        """

    @abstractmethod
    def solve_densely(self, metric: KeyMetric | None, moment: Callable[[], Tensor], keys: Tensor, history: KeyHistory,
                      hparams: SPHEREHyperParams) -> Tensor:
        """Adjusted keys ``(d_in, n)`` by the plain closed form, where the one in the space of keys fails.

        Args:
            metric: the layer's, as ``key_metrics`` gave it.
            moment: reads the second moment of the layer's keys ``(d_in, d_in)`` float32, on the keys' device.
            keys: the batch's ``(d_in, n)``.
            history: earlier keys.

        Raises:
            torch.linalg.LinAlgError: the system is singular.
        """

    def restrain(self, update: Update, weight: Tensor, hparams: SPHEREHyperParams) -> Update:
        """What is kept of one layer's update, before SPHERE; the update itself if all of it is.

        Args:
            update: in factors, or dense ``(d_out, d_in)``.
            weight: ``(d_out, d_in)`` before the update.
        """
        return update

    def restrain_whole_change(self, change: Tensor, original: Tensor, hparams: SPHEREHyperParams) -> Tensor:
        """What is kept of the whole change since the pretrained weight, in the weights that are evaluated and saved.

        Editing goes on from the unrestrained ones. Called only where ``restrains_whole_change``.

        Args:
            change: ``W - W0`` ``(d_out, d_in)``.
            original: W0.
        """
        return change


class WrappedMethod(Method):
    """A method that EasyEdit alone has: all that is known of it here is the updates that it makes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def key_metrics(self, *_: Any, **__: Any) -> dict[int, KeyMetric | None]:
        raise NotImplementedError(f"{self.name} is solved by EasyEdit")

    def solve_densely(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError(f"{self.name} is solved by EasyEdit")
