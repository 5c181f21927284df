"""Key/value caches: what a model calls them, and the tensors that they hold."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from kbitcheck.observe.probes.live import tensors

# Names of a block's argument, from transformers 5.24 on the first.
ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
# Names in an output, the newer first: reading the older one there is warned of.
OUTPUTS = ("cache", "past_key_values")
OUTPUT = next(name for name in OUTPUTS if name in CausalLMOutputWithPast.__dataclass_fields__)


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where there is none."""
    held = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    return next((held[name] for name in OUTPUTS if name in held), None)


def without_cache(output: Any) -> Any:
    """What a model returns, but for its cache."""
    return {k: v for k, v in output.items() if k not in OUTPUTS} if isinstance(output, Mapping) else output


def cached_tensors(cache: Any) -> Iterator[torch.Tensor]:
    """Tensors that a cache holds, in either of its forms."""
    if isinstance(cache, (tuple, list)):
        yield from tensors(cache)
    for part in (cache, *(getattr(cache, f"{kind}_attention_cache", None) for kind in ("self", "cross"))):
        for layer in getattr(part, "layers", None) or ():
            yield from (t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)


def is_held(output: Any) -> bool:
    """Whether an output holds a cache with tensors."""
    return any(True for _ in cached_tensors(cache_of(output)))
