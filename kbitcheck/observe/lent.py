"""A caller's own model in the place of a base."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kbitcheck import backends
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable, cause
from kbitcheck.core.training import Training
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.observe import internals
from kbitcheck.observe.in_place import left_as_it_was
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import digest
from kbitcheck.observe.probes.loss import GiveLoss
from kbitcheck.observe.watch import LENT


class Lent(Loaded):
    """What cases get as a fresh copy is the caller's model itself, as it was: ``restore`` puts the model back to that.

    Cases hold the model by turns: ``lease`` says whose turn it is. ``no_step`` is why the model may not run; "" where it
    may. ``training`` is how its owner trains it.
    """

    copies = False
    patched = True

    def __init__(
        self,
        model: Any,
        spec: CaseSpec,
        restore: Callable[[], None],
        *,
        no_step: str = "",
        training: Training,
        **options: Any,
    ) -> None:
        self.pristine = model
        self._restore = restore
        self._loss = GiveLoss(training.loss)
        self.reads_labels = training.loss is not None
        self._no_step = no_step
        batch = {} if no_step else training.batch  # nor a step that chooses a batch
        super().__init__(self.copy(), LiveModel.of(model), spec, batch=batch, training=training, **options)

    def copy(self) -> Any:
        self.lease = object()
        self._restore()
        backends.steady(self.pristine)
        self.pristine.state_dict()  # a backend may undo what it repacked for inference when it saves
        self.pristine.register_forward_hook(self._loss)  # which the next restore takes off
        return self.pristine

    def reload(self, folder: str, device: str) -> Any:
        model = super().reload(folder, device)
        model.register_forward_hook(self._loss)
        return model

    def require_step(self) -> None:
        if self._no_step:
            raise Unavailable(self._no_step)

    def own_copy(self) -> Any:
        if self.large:
            raise Unavailable("memory is measured on a copy, and this model is too large for one")
        try:
            return copy.deepcopy(self.copy())
        except (RuntimeError, TypeError) as error:
            raise Unavailable(f"memory is measured on a copy, and the model cannot be copied: {cause(error)}") from None

    def original(self) -> Any:
        return self.copy()


def why_no_step(model: nn.Module, *, allow_step: bool | None) -> str:
    """Why no step may be taken on a caller's model; "" where one may.

    None is taken for which other ranks would have to wait, unless ``allow_step`` is True.
    """
    if allow_step is False:
        return "no step was allowed (allow_step=False)"
    if allow_step is None and internals.is_sharded(model):
        return "the model is sharded, so that every rank would have to step: allow_step=True on every rank"
    return ""


def unwrapped(model: Any) -> Any:
    """The model inside ``DistributedDataParallel``, whose own steps no other rank waits for, and inside ``torch.compile``."""
    inner = model.module if isinstance(model, DistributedDataParallel) else internals.compiled_from(model)
    return model if inner is model else unwrapped(inner)


@contextmanager
def lending(model: nn.Module) -> Iterator[Callable[[], None]]:
    """As ``left_as_it_was``; warns where something wrote numbers into a frozen parameter in place, which nothing restores."""
    before = _digests(model)
    modules = list(model.modules())
    for module in modules:
        vars(module)[LENT] = True
    try:
        with left_as_it_was(model) as restore:
            yield restore
    finally:
        for module in modules:
            vars(module).pop(LENT, None)
    written = [name for name, bits in _digests(model).items() if bits != before[name]]
    if written:
        others = f" and {len(written) - 1} others" if written[1:] else ""
        warnings.warn(f"something wrote into {written[0]}{others} in place: load the model again", stacklevel=4)


def _digests(model: nn.Module) -> dict[str, str]:
    return {name: digest.bits(p) for name, p in model.named_parameters() if not p.requires_grad}
