"""What a use is done to, and what came of it: tensors and texts by name."""

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn

from kbitcheck import backends
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Raised, Unavailable
from kbitcheck.models.inputs.text import Batch
from kbitcheck.observe.drawn_adapters import drawn_adapters
from kbitcheck.observe.drawn_batch import drawn_batch
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.probes.step import Autocast

T = TypeVar("T")
Value = torch.Tensor | str | Raised
Outcome = Mapping[str, Value]
Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class Subject:
    """A fresh model without adapters, and how the case trains it: a ``fresh`` base that was ``prepared`` is another one.

    ``prepared`` takes keyword arguments of the preparation, too, where they are not the case's.
    """

    model: Any
    preparation: Preparation
    fresh: Callable[[], Any]
    prepared: Callable[..., Any]

    @property
    def batch(self) -> step.Batch:
        """The batch's first row, without a mask."""
        return self.preparation.loaded.single

    @property
    def spec(self) -> CaseSpec:
        """The case, with adapters that are drawn for its base."""
        return drawn_adapters(self.preparation.loaded, self.preparation.spec, shared=True)

    def another(self) -> Any:
        """One more such model."""
        return self.prepared(self.fresh())

    def attached(self, model: Any = None) -> Attached:
        """The model with the case's adapters, or another one."""
        return self.preparation.attach(self.model if model is None else model, self.spec)

    def with_peft(self, *, drawn: bool = True, **options: Any) -> Attached | None:
        """The model under PEFT with a LoRA of these options, all of which it trains; None where PEFT is not installed.

        Its numbers are drawn, or those that PEFT starts from.
        """
        if find_spec("peft") is None:
            return None
        from peft import LoraConfig, get_peft_model

        loaded, spec = self.preparation.loaded, self.spec
        fit = [name for name in spec.layers or loaded.targets if name not in loaded.unfit_targets]
        config = LoraConfig(
            **{"r": spec.rank, "lora_alpha": round(spec.scaling * spec.rank), "target_modules": fit, **options}
        )
        with switches.seeded(spec.seed, self.batch):
            wrapped: Any = get_peft_model(self.model, config)
        if drawn:
            # Magnitudes start at the norms of the layers' rows, about which they stay.
            factors = {n: p for n, p in wrapped.named_parameters() if ".lora_" in n and "magnitude" not in n}
            adapter_probe.draw(factors, spec.seed)
        return Attached(wrapped, {n: p for n, p in wrapped.named_parameters() if p.requires_grad})

    def step(self, model: nn.Module, parameters: Parameters, autocast: Autocast | None = None) -> Outcome:
        """The loss of a training step, and the gradients of these parameters."""
        facts, gradients = step.train_step(
            model,
            self.batch,
            parameters,
            seed=self.preparation.spec.seed,
            autocast=autocast or self.preparation.autocast,
            watch=False,
        )
        return {"the loss": torch.tensor(facts.loss, dtype=torch.float64), **gradients_of(gradients)}

    def loss(self, model: nn.Module, *, length: int | None = None) -> torch.Tensor:
        """The loss of a forward in train mode, with its graph; of text of another ``length`` where the batch is text alone."""
        model.train()
        batch = step.feed(model, self.batch)
        if length is not None and batch.keys() <= {"input_ids", "labels", "attention_mask"}:
            batch = {name: tensor[:, :length] for name, tensor in batch.items()}
        with switches.seeded(self.preparation.spec.seed, self.batch), self.preparation.autocast():
            loss: torch.Tensor = model(**batch).loss
        return loss

    def logits(
        self, model: nn.Module, batch: Batch | None = None, *, without: Callable[[], Any] = torch.no_grad
    ) -> torch.Tensor:
        """The logits of a forward in eval mode, of the batch's first row or of another batch; gradients are off by ``without``."""
        model.eval()
        with without(), self.preparation.autocast():
            logits: torch.Tensor = model(**step.feed(model, batch or self.batch)).logits
        return logits

    def autocast(self, dtype: torch.dtype) -> Autocast:
        """Makes a context of autocast in a dtype where the batch is."""
        return partial(torch.autocast, step.device(self.batch).type, dtype=dtype)

    def drawn_in_order(self, values: Sequence[T]) -> Sequence[T]:
        """Values in an order that is the same for each case of a base."""
        spec = self.preparation.spec
        return random.Random(f"{spec.seed} {spec.model.rpartition('/')[2]}").sample(values, len(values))  # noqa: S311

    def drawn(self) -> Batch | None:
        """A batch of other rows and another length, the same for each case of a base; None where the caller named the batch."""
        try:
            return drawn_batch(self.preparation.loaded, self.preparation.spec, shared=True)[1]
        except Unavailable:
            return None


Use = Callable[[Subject], Outcome]
USES: dict[str, Use] = {}


def use(action: Use) -> Use:
    """Register a use under its name in words."""
    USES[action.__name__.replace("_", " ")] = action
    return action


def gradients_of(gradients: Mapping[str, torch.Tensor | None]) -> Outcome:
    """Gradients as an outcome."""
    return {f"gradient of {n}": "none" if g is None else g.detach().clone() for n, g in gradients.items()}


def numbers(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Tensors in a row, as one in float32."""
    return torch.cat([p.detach().float().flatten() for p in parameters])


def floating(module: nn.Module | None) -> dict[str, nn.Parameter]:
    """The floating parameters of a module that are not packed."""
    own = {} if module is None else dict(module.named_parameters())
    return {n: p for n, p in own.items() if p.is_floating_point() and not backends.is_packed(p)}


def thawed(module: nn.Module | None, within: str) -> dict[str, nn.Parameter]:
    """The floating parameters of a module, which now require grad, by their names under ``within``."""
    own = {f"{within}.{n}": p for n, p in floating(module).items()}
    for parameter in own.values():
        parameter.requires_grad_(True)
    return own


def attempt(action: Callable[[], Value]) -> Value:
    """What an action returns, or what it raises."""
    try:
        return action()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Raised.of(error)


def done(action: Use, subject: Subject) -> Outcome:
    """What comes of a use; what it raises as a whole stands under the empty name."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return action(subject)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return {"": Raised.of(error)}
