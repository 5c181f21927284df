"""The tensors of a compressed-tensors checkpoint, by the groups of its configuration."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kbitcheck.backends import packed
from kbitcheck.core.errors import UsageError

Group = Mapping[str, Any]


def scheme_of(group: Group) -> str:
    """The name of the scheme of a group of layers; a ``UsageError`` for one that has none here."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind == "float" and bits == 8:
        return "compressed-tensors-fp8"
    if kind == "int" and bits in (4, 8):
        return f"compressed-tensors-int{bits}" if not inputs else "compressed-tensors-int8-dynamic"
    raise UsageError(
        f"this checkpoint is quantized by compressed-tensors as {kind}{bits}; kbitcheck supports int4, int8 and fp8"
    )


def lay_out(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Put each matched layer's tensors in its place, on the meta device."""
    groups, ignored = list((config.get("config_groups") or {}).values()), config.get("ignore") or ()
    for name, module in packed.linears(model, in_blocks=False):
        group = None if any(_matches(name, each) for each in ignored) else _group(groups, name)
        if group is not None:
            packed.pack_linear(model, name, scheme_of(group), _layout(group, config, _dtype(module)))
    for name, module, wide in packed.stacked(model):
        # A checkpoint has an expert's layers one by one.
        group = (
            None
            if any(_matches(f"{name}.0.up_proj", each) for each in ignored)
            else _group(groups, f"{name}.0.up_proj")
        )
        if group is not None:
            packed.pack_stack(model, module, wide, scheme_of(group), _layout(group, config, _dtype(module)))

    for module in model.modules() if config.get("kv_cache_scheme") else ():
        own = dict(module.named_children())
        if type(module).__name__.endswith("Attention") and own.keys() & {"k_proj", "qkv_proj"}:
            for name in ("k_scale", "v_scale"):  # of what a cache would keep in fewer bits, each of one number
                module.register_buffer(name, torch.empty(1, dtype=_dtype(model), device=packed.META))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _matches(name: str, target: str) -> bool:
    """Whether a target names a layer: its class, its whole name, or a pattern of that from its beginning on."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def _group(groups: Sequence[Group], name: str) -> Group | None:
    """The group whose target is nearest: a name before a pattern before the class."""
    ranked = (
        (target in ("Linear",), target.startswith("re:"), group)
        for group in groups
        for target in group["targets"]
        if _matches(name, target)
    )
    return min(ranked, key=lambda each: each[:2], default=(0, 0, None))[2]


def _layout(group: Group, config: Mapping[str, Any], dtype: torch.dtype) -> packed.Layout:
    weights, inputs = group["weights"], group.get("input_activations") or {}
    bits, words = weights.get("num_bits", 8), (group.get("format") or config.get("format")) == "pack-quantized"

    def tensors(rows: int, columns: int) -> Any:
        return dict(_tensors(rows, columns))

    def _tensors(rows: int, columns: int) -> Iterator[tuple[str, Any]]:
        shape = _scales(weights, rows, columns)
        if words:
            yield "weight_packed", ((rows, -(-columns * bits // 32)), torch.int32)
            yield "weight_shape", ((2,), torch.int64)
        else:
            yield (
                "weight",
                ((rows, columns), torch.int8 if weights.get("type", "int") == "int" else torch.float8_e4m3fn),
            )
        yield "weight_scale", (shape, dtype)
        if not weights.get("symmetric", True):
            yield (
                "weight_zero_point",
                (
                    ((-(-rows * bits // 32), *shape[1:]), torch.int32)
                    if words and len(shape) > 1
                    else (shape, torch.int8)
                ),
            )
        if weights.get("actorder") == "group":
            yield "weight_g_idx", ((columns,), torch.int32)
        if inputs and not inputs.get("dynamic"):
            yield "input_scale", ((1,), dtype)
            if not inputs.get("symmetric", True):
                yield "input_zero_point", ((1,), torch.int8)

    return tensors


def _scales(weights: Mapping[str, Any], rows: int, columns: int) -> tuple[int, ...]:
    strategy = weights["strategy"]
    if strategy == "tensor":
        return (1,)
    if strategy == "block":
        high, wide = weights["block_structure"]
        return packed.groups(rows, high), packed.groups(columns, wide)
    return rows, packed.groups(columns, weights["group_size"]) if strategy == "group" else 1
