"""Forms in which a model is called to train: what a training script may write in place of the batch's own keywords."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kbitcheck.observe.probes.loss import drawn_loss

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """One form. ``fits`` says whether there is such a call of a batch; ``inputs`` makes its keywords for a model.

    ``reason`` is why scripts call so. ``needs`` names a keyword that the forward must take. ``exact`` says whether a float64
    twin can be called so, and no block is handed what it changes.
    """

    name: str
    reason: str
    inputs: Callable[[Any, Inputs], Inputs]
    needs: str = ""
    fits: Callable[[Mapping[str, Any]], bool] = lambda batch: True
    positional: bool = False
    exact: bool = True

    def taken_by(self, model: nn.Module, batch: Mapping[str, Any]) -> bool:
        """Whether the model's forward takes the form."""
        if self.positional and not _leading(model, dict(batch)):
            return False
        accepted = inspect.signature(type(model).forward).parameters.values()
        anything = any(p.kind is p.VAR_KEYWORD for p in accepted)
        return self.fits(batch) and (not self.needs or anything or self.needs in {p.name for p in accepted})

    def output(self, model: nn.Module, batch: Inputs) -> Any:
        """What the forward gives."""
        inputs = self.inputs(model, batch)
        leading = _leading(model, inputs) if self.positional else []
        return model(*leading, **inputs)

    def loss(self, output: Any) -> torch.Tensor:
        """The forward's own loss; where it has none, one of its logits."""
        loss: Any = output[0] if isinstance(output, tuple) else output.get("loss")
        own: torch.Tensor = drawn_loss([output.logits]) if loss is None else loss
        return own


class Formed(dict[str, torch.Tensor]):
    """A batch that a model is called with in a form."""

    def __init__(self, batch: Mapping[str, torch.Tensor], form: Form) -> None:
        super().__init__(batch)
        self.form = form


def _leading(model: Any, inputs: Inputs) -> list[Any]:
    """The inputs with which the forward's parameters begin, taken out of ``inputs``; of a wrapper those of what it wraps."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    values: list[Any] = []
    for name in [*inspect.signature(type(inner).forward).parameters][1:]:
        if name not in inputs:
            break
        values.append(inputs.pop(name))
    return values


def _with(**keywords: Any) -> Callable[[Any, Inputs], Inputs]:
    return lambda model, batch: {**batch, **keywords}


def _without(*names: str) -> Callable[[Any, Inputs], Inputs]:
    return lambda model, batch: {name: value for name, value in batch.items() if name not in names}


def _positions(model: Any, batch: Inputs) -> Inputs:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return {**batch, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _embedded(model: Any, batch: Inputs) -> Inputs:
    return {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), **_without("input_ids")(model, batch)}


def _mask(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Inputs], Inputs]:
    return lambda model, batch: {**batch, "attention_mask": change(batch["attention_mask"])}


def _views(model: Any, batch: Inputs) -> Inputs:
    """Tensors of the same numbers that are not contiguous, of short integers."""
    views = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in batch.items()}
    return {**views, "input_ids": views["input_ids"].int()}


def _kept(model: Any, batch: Inputs) -> Inputs:
    return {**_without("labels")(model, batch), "logits_to_keep": 3}


def _of_text(batch: Mapping[str, Any]) -> bool:
    return "input_ids" in batch and "labels" in batch


def _masked(batch: Mapping[str, Any]) -> bool:
    return "attention_mask" in batch


def _wide_mask(model: Any, batch: Inputs) -> Inputs:
    """A mask of each token for each other, which is added to the scores of attention."""
    mask, dtype = batch["attention_mask"], model.get_input_embeddings().weight.dtype
    seen = mask[:, None, None, :].bool() & torch.ones(mask.shape[1], mask.shape[1], device=mask.device).tril().bool()
    return {**batch, "attention_mask": torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)}


PLAIN = Form("its own keywords", "trainers pass a batch by its keywords", _with())
FORMS: Sequence[Form] = (
    PLAIN,
    Form("embeddings", "soft prompts, and towers of one's own", _embedded, "inputs_embeds", _of_text),
    Form("position ids", "packed sequences", _positions, "position_ids", _of_text),
    Form("no mask", "batches of one length", _without("attention_mask"), fits=_masked),
    Form("a mask of booleans", "collators of one's own", _mask(torch.Tensor.bool), fits=_masked),
    Form("a mask of floats", "collators of one's own", _mask(torch.Tensor.float), fits=_masked),
    Form("a wide mask", "packed sequences", _wide_mask, fits=_masked, exact=False),
    Form("use_cache=False", "as recipes do with checkpointing", _with(use_cache=False), "use_cache"),
    Form("use_cache=True", "as a configuration says", _with(use_cache=True), "use_cache", exact=False),
    Form("hidden states", "distillation", _with(output_hidden_states=True), "output_hidden_states"),
    Form("attentions", "maps of attention", _with(output_attentions=True), "output_attentions", exact=False),
    Form("return_dict=False", "scripts older than output classes", _with(return_dict=False), "return_dict"),
    Form("return_dict=True", "scripts as old", _with(return_dict=True), "return_dict"),
    Form("no labels", "a loss of one's own", _without("labels"), fits=_of_text),
    Form("logits_to_keep", "a loss of answers alone", _kept, "logits_to_keep", _of_text),
    Form(
        "num_items_in_batch", "Trainer, which accumulates", _with(num_items_in_batch=7), "num_items_in_batch", _of_text
    ),
    Form("positional arguments", "scripts of one's own", _with(), fits=_of_text, positional=True),
    Form("views of short integers", "collators that transpose", _views, fits=_of_text),
)
