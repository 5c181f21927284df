"""Fewer tokens for a cut of a model: the first rows of its embeddings and head, where a batch needs no others."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

COMMON = 4096  # tokens that batches are drawn from: the first, which are the most frequent ones of most vocabularies
WORTH = 2  # a vocabulary is shortened to at most its half
IDS = ("token_id", "token_index")
# Ends that a generation compares with, and that no embedding looks up.
COMPARED = {"bos_token_id", "eos_token_id"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The first ``kept`` of ``total`` tokens."""

    kept: int
    total: int

    def __str__(self) -> str:
        return f"{self.kept:,} of {self.total:,} tokens"

    def shorten(self, config: PretrainedConfig) -> None:
        """Have a configuration describe fewer tokens, in place."""
        if getattr(config, "vocab_size", None) == self.total:
            config.vocab_size = self.kept

    def shorten_settings(self, model: nn.Module) -> None:
        """Have the modules of a model, and their configurations, count fewer tokens, in place."""
        for module in model.modules():
            vars(module).update(
                {key: self.kept for key, value in vars(module).items() if type(value) is int and value == self.total}
            )
            config = vars(module).get("config")
            for each in nested(config) if isinstance(config, PretrainedConfig) else ():
                self.shorten(each)

    def is_shorter(self, whole: torch.Tensor, short: torch.Tensor) -> bool:
        """Whether one tensor has so many rows, the other so many fewer, and their rows the same shape."""
        return (*whole.shape[:1], *short.shape[:1]) == (self.total, self.kept) and whole.shape[1:] == short.shape[1:]

    def of(self, model: nn.Module, names: Set[str]) -> Mapping[int, nn.Parameter] | None:
        """By the id of each parameter of that name, its first rows; None where other tensors count the tokens as well."""
        tensors = dict(_tensors(model))
        ids = {id(tensors[name]) for name in names if name in tensors}
        counting = {id(t) for t in tensors.values() if self.total in t.shape}
        parameters = {
            id(t): t for t in tensors.values() if id(t) in ids and type(t) is nn.Parameter and t.is_floating_point()
        }
        if not ids or not ids == counting == parameters.keys():
            return None
        return {key: self._first_rows(parameter) for key, parameter in parameters.items()}

    def _first_rows(self, parameter: nn.Parameter) -> nn.Parameter:
        first = nn.Parameter(parameter.detach()[: self.kept].clone(), requires_grad=parameter.requires_grad)
        vars(first).update(vars(parameter))
        return first


def fewer(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Vocabulary | None:
    """The vocabulary that a batch and the model's configurations need; None where it is not worth its price."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    total = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(total, int):
        return None
    ids = [int(t.max()) for t in batch.values() if t.numel() and t.dtype is torch.int64]
    least = max([COMMON - 1, *ids, *_special(config.to_dict())])
    kept = 1 << least.bit_length()
    return Vocabulary(kept, total) if kept * WORTH <= total else None


def nested(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration and all that are inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from nested(value)


def _special(config: Mapping[Any, Any]) -> Iterator[int]:
    """Tokens that a configuration names, and those inside it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif isinstance(key, str) and key.endswith(IDS) and key not in COMPARED:
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
