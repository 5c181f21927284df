"""Merges a saved adapter into its base: into packed weights, into the weights they stand for, and into the original ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kbitcheck import backends
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import Unavailable, UsageError, cause
from kbitcheck.core.facts.adapter import MergedLayer, MergeFacts, SavedAdapter
from kbitcheck.core.memory_sizes import GIB
from kbitcheck.models import load as loading
from kbitcheck.models.sources.source import Source
from kbitcheck.observe import device, internals
from kbitcheck.observe.adapter import folder, renamed
from kbitcheck.observe.adapter.replaced import put_in

PREFIX = "base_model.model."
ULP = torch.finfo(torch.float32).eps
BYTES = 13  # for each weight: packed, in float32, and in float64
HALVES = (torch.bfloat16, torch.float16)
ROWS, TOKENS = 2, 16
Merge = Callable[[Any], Any]


def merge(layer: Any) -> Any:
    """Merge one layer's adapter as PEFT does; of a module that trains whole, the one that takes its place."""
    if hasattr(layer, "merge"):
        return layer.merge()
    return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)


def facts(source: Source, quant: Quantization, path: Path, adapter: SavedAdapter, merging: Merge = merge) -> MergeFacts:
    """What merging by ``merging`` does. Loads the base several times, one after the other; the largest is in float64.

    Raises:
        Unavailable: the adapter cannot be merged, or not in the memory that is free.
        UsageError: PEFT is not installed, or the base has no weights.
    """
    needed, free = BYTES * sum(p.numel() for p in source.meta(None).parameters()), device.free_bytes("cpu")
    if needed > free:
        raise Unavailable(f"merging takes about {needed / GIB:.0f} GiB, and {free / GIB:.0f} are free")
    packed = source.load(quant)
    try:
        batch = {k: v for k, v in source.batch(packed, batch=ROWS, seq_len=TOKENS).items() if k != "labels"}
    except UsageError as error:
        raise Unavailable(f"a merge is tried on inputs, and none can be made: {error}") from None
    _put_trained_tokens(batch, adapter)
    unpacked = _unpacked(source, packed)
    without = _logits(copy.deepcopy(unpacked).double(), batch)
    exact = _logits(_attached(copy.deepcopy(unpacked), path).double(), batch)
    norm = float(exact.norm())
    errors: dict[str, float] = {}
    refused: list[str] = []

    def off(name: str, model: Any) -> None:
        errors[name] = float((_logits(model, batch) - exact).norm()) / norm

    def off_merged(name: str, model: Any) -> None:
        try:
            off(f"merged into {name}", _all_merged(model, merging))
        except NotImplementedError:
            refused.append(name)

    on = _attached(packed, path)
    off(f"on {quant}", on)
    off_merged(str(quant), on)
    del on, packed
    single = _attached(copy.deepcopy(unpacked), path)
    adapter = renamed.beside(source.meta(None), adapter)
    seen, unread = _merged_layers(single, path, adapter, merging)
    seen += _replaced_modules(single, path, adapter, merging)
    del single
    dtype = getattr(torch, source.unquantized_dtype)
    name = source.unquantized_dtype
    off_merged(f"the unpacked weights in {name}", _attached(unpacked.to(dtype), path))
    if source.quant is None:
        off_merged(f"the original weights in {name}", _attached(source.load_unquantized(), path))
    effect = float((exact[..., : without.shape[-1]] - without).norm()) / norm  # without the tokens that it adds
    return MergeFacts(layers=tuple(seen), errors=errors, effect=effect, unread=tuple(unread), refused=tuple(refused))


def _put_trained_tokens(batch: Mapping[str, Any], adapter: SavedAdapter) -> None:
    """Put tokens whose rows the adapter stores at the beginning of each row of a batch: others do not show what these do."""
    rows = [row for layer in adapter.layers.values() for tensor in layer.replacing for row in tensor.rows or ()]
    ids = batch.get("input_ids")
    if ids is not None and rows:
        rows = rows[: ids.shape[1] // 2]
        ids[:, : len(rows)] = torch.tensor(rows)


def _unpacked(source: Source, packed: Any) -> Any:
    """The model in float32 without quantization, with the numbers that packed weights stand for."""
    model: Any = source.meta(None).to_empty(device="cpu").float()
    quantized = dict(backends.quantized_layers(packed))
    own = dict(packed.named_parameters(remove_duplicate=False)) | dict(packed.named_buffers())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            module, _, part = name.rpartition(".")
            number = own.get(name)
            if module in quantized and part == "weight":
                number = backends.arithmetic(quantized[module]).exact(quantized[module])
                number = number.T if isinstance(model.get_submodule(module), Conv1D) else number
            if number is None:
                raise Unavailable(f"the base has no {name} once it is quantized")
            tensor.copy_(number)
    model.tie_weights()
    return model.eval()


def _attached(model: Any, path: Path) -> Any:
    """The model with the saved adapter, for inference, in the adapter's own dtype."""
    if not any((path / name).exists() for name in (folder.WEIGHTS, folder.PICKLE)):
        raise Unavailable(f"PEFT reads one file alone, {folder.WEIGHTS}, and this adapter is in shards")
    try:
        from peft import PeftModel
    except ImportError:
        raise UsageError("merging needs PEFT: pip install peft") from None
    with warnings.catch_warnings(), loading.quiet(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # rows that no file has are the same in each form
        try:
            rows = max(_token_rows(model, path), default=0)
            if rows > model.get_input_embeddings().weight.shape[0]:
                model.resize_token_embeddings(rows, mean_resizing=False)
            return PeftModel.from_pretrained(model, str(path), autocast_adapter_dtype=False).eval()
        except Exception as error:
            raise Unavailable(f"PEFT does not load it on this base: {cause(error)}") from error


def _token_rows(model: Any, path: Path) -> Iterator[int]:
    """The rows of each embedding and head that the adapter stores whole."""
    ends = [id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    names = {name for name, module in model.named_modules() if id(module) in ends}
    for layer in folder.read(path).layers.values():
        if layer.of_base in names and "weight" in layer.tensors:
            yield layer.tensors["weight"].shape[0]


def _logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits in float64; those of a model in half precision under its autocast, as adapters may be in float32."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not backends.is_packed(p)}
    half = next((dtype for dtype in HALVES if dtype in dtypes), None)
    kernels = internals.without_grouped_kernel()  # which takes no float64
    with torch.no_grad(), kernels, torch.autocast("cpu", dtype=half, enabled=half is not None):
        out = model(**batch)
    logits: Tensor | None = getattr(out, "logits", None)
    if logits is None:
        raise Unavailable("the base computes no logits")
    return logits.double()


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapted modules, by the path that the adapter's file has for each."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name.removeprefix(PREFIX), module


def _all_merged(model: Any, merging: Merge) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, layer in _layers(model):
            merging(layer)
    return model


def _merged_layers(
    model: Any, path: Path, adapter: SavedAdapter, merging: Merge
) -> tuple[list[MergedLayer], list[str]]:
    """Each layer beside what the file says that it adds; those whose method is not a plain product, beside what they add to an output."""
    seen, unread = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_place = {each.placed or each.module: each for each in adapter.layers.values() if not each.gathered}
        for name, layer in _layers(model):
            saved = by_place.get(name)
            if saved is None or saved.replaced:
                continue
            plain = saved.norm is not None and set(saved.tensors) <= {
                "lora_A",
                "lora_B",
                "lora_embedding_A",
                "lora_embedding_B",
                "weight",
            }
            try:
                one = (
                    _by_weight(name, layer, folder.delta(path, saved), merging)
                    if plain
                    else _by_output(name, layer, merging)
                )
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
                one = None
            unread += [name] if one is None else []
            seen += [] if one is None else [one]
    return seen, unread


def _replaced_modules(model: Any, path: Path, adapter: SavedAdapter, merging: Merge) -> Iterator[MergedLayer]:
    """Each tensor that takes the place of the base's, beside what is there once the module is merged; a copy is exact."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    def original(module: Any) -> Any:
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module

    saved = {
        f"{layer.of_base}.{tensor.of_base}": tensor for layer in adapter.layers.values() for tensor in layer.replacing
    }
    whole = {name for name, layer in adapter.layers.items() if layer.replaced}
    for name, module in list(model.named_modules()):
        tuner = isinstance(module, BaseTunerLayer) and name.removeprefix(PREFIX) in whole
        if not tuner and not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        before = {n: p.detach().clone() for n, p in original(module).named_parameters()}
        merged = merging(module) or original(module)
        after = {n: p.detach().clone() for n, p in merged.named_parameters()}
        unmerging = getattr(module, "token_adapter", module)
        if getattr(unmerging, "merged", False):
            unmerging.unmerge()
        restored = dict(original(module).named_parameters())
        for part, own in before.items():
            place = f"{name.removeprefix(PREFIX)}.{part}"
            meant = put_in(own, folder.tensor(path, saved[place]), saved[place]) if place in saved else None
            if meant is None or torch.equal(meant, own):
                continue
            (share,) = _shares((after[part] - own)[None], (meant - own)[None])
            off = _off(restored[part], own, after[part])
            yield MergedLayer(module=place, landed=(share,), bound=0.0, restored=off)


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    return weight.detach()


def _by_weight(name: str, layer: Any, delta: Tensor, merging: Merge) -> MergedLayer | None:
    """``delta`` is (experts, out, in), in float32."""
    before = _weight(layer).clone()
    merging(layer)
    after = _weight(layer).clone()
    restored = _restored(layer, before, after)
    stacked = before.shape if before.dim() == 3 else (1, *before.shape)
    landed = (after - before).reshape(stacked)
    # Which way a square weight lies does not show: then the better one counts.
    ways = [way for way in (delta, delta.transpose(1, 2)) if way.shape == landed.shape]
    if not ways or not bool(delta.any()):
        return None
    shares = max(([*_shares(landed, way)] for way in ways), key=lambda shares: -max(abs(share - 1) for share in shares))
    size, added = float(before.norm()), float(delta.norm())
    bound = 4 * ULP * (size / added + delta.shape[1] ** 0.5)
    return MergedLayer(module=name, landed=tuple(shares), bound=bound, restored=restored)


def _by_output(name: str, layer: Any, merging: Merge) -> MergedLayer | None:
    """What the adapter adds to the outputs of a layer for inputs that are drawn."""
    base = layer.get_base_layer()
    x = torch.randn(TOKENS, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off, on = base(x), layer(x)
        before = _weight(layer).clone()
        merging(layer)
        merged = layer(x)
    restored = _restored(layer, before, _weight(layer).clone())
    added, size = float((on - off).norm()), float(off.norm())
    if not added:
        return None
    (share,) = _shares((merged - off)[None], (on - off)[None])
    bound = 4 * ULP * (size / added) * x.shape[1] ** 0.5
    return MergedLayer(module=name, landed=(share,), bound=bound, restored=restored)


def _restored(layer: Any, before: Tensor, after: Tensor) -> float:
    layer.unmerge()
    return _off(_weight(layer), before, after)


def _off(restored: Tensor, before: Tensor, after: Tensor) -> float:
    """How far unmerging leaves a weight from where it was, beside all that was added up in it."""
    return float((restored - before).norm() / (before.norm() + (after - before).norm()))


def _shares(landed: Tensor, delta: Tensor) -> Iterator[float]:
    """The projection of what landed on what was to land, of each expert that adds something."""
    for actual, wanted in zip(landed, delta, strict=True):
        square = float(wanted.double().square().sum())
        yield float((actual.double() * wanted.double()).sum()) / square if square else 1.0
