"""A model at one stage, as plain data. Reads only: nothing is run, cast, moved or saved."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from kbitcheck_reference.adapters import is_adapter_module
from torch import nn

from kbitcheck import backends
from kbitcheck.core.facts import LayerFacts, ModelFacts, ModuleFacts, TensorFacts
from kbitcheck.models.blocks import is_block, tower
from kbitcheck.observe import internals
from kbitcheck.observe.probes import digest
from kbitcheck.observe.probes.parts import parts

NORM_CLASS = re.compile(r"norm", re.IGNORECASE)
NORM_NAME = re.compile(r"(^|_|\.)(ln(_?\w+)?|\w*norm\w*)$", re.IGNORECASE)


def snapshot(
    model: nn.Module,
    adapters: Mapping[str, nn.Parameter] | None = None,
    *,
    declared: Mapping[str, nn.Parameter] | None = None,
) -> ModelFacts:
    """Facts of every parameter, buffer, quantized layer and module.

    ``adapters`` are the parameters that train; ``declared`` are those of them that belong to no adapter.
    """
    return ModelFacts(
        cls=type(model).__name__,
        **_tensors(model, adapters or {}, declared or {}),
        modules={n: _module(n, m) for n, m in model.named_modules()},
        config=_config(model),
        can_checkpoint=can_checkpoint(model),
        embeddings=_names(model, embeddings(model)),
        heads=_names(model, heads(model)),
        kept_in_float32=internals.kept_in_float32(model),
        marks=dict(_marks(model)),
    )


def tensors_again(
    before: ModelFacts, model: nn.Module, adapters: Mapping[str, nn.Parameter] | None = None
) -> ModelFacts:
    """The facts of an earlier snapshot of the model with those of its parameters, buffers and quantized layers as they are now."""
    return replace(before, **_tensors(model, adapters or {}, {}))


def _tensors(
    model: nn.Module, adapters: Mapping[str, nn.Parameter], declared: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    met = _Met()
    owned, named = {id(p) for p in adapters.values()}, {id(p) for p in declared.values()}
    layers = dict(backends.holders(model))
    packed = {id(backends.recognition(m).packed(m)) for m in layers.values()}
    # Of a class that FSDP gave it; where FSDP has flattened it, there is none.
    packed |= {id(getattr(m, "weight", None)) for _, m, _ in backends.emptied_layers(model)}
    biases = {id(m.bias) for m in layers.values() if getattr(m, "bias", None) is not None}
    return {
        "parameters": {
            n: _tensor(
                n,
                p,
                met,
                packed=id(p) in packed or backends.is_packed(p),
                adapter=id(p) in owned,
                declared=id(p) in named,
                quantized_bias=id(p) in biases,
            )
            for n, p in model.named_parameters(remove_duplicate=False)
        },
        "buffers": {
            n: _tensor(n, b, met, packed=id(b) in packed) for n, b in model.named_buffers(remove_duplicate=False)
        },
        "layers": {**{n: layer(n, m) for n, m in layers.items()}, **dict(_stacks(model))},
    }


def state_keys(model: nn.Module) -> frozenset[str]:
    """The keys that a model saves; where that raises, the exception in their place."""
    try:
        return frozenset(model.state_dict())
    except Exception as error:  # as of a quantization state that lost a part: a fact, not a crash
        return frozenset({f"{type(error).__name__}: {error}"})


def _marks(model: Any) -> Iterator[tuple[str, str]]:
    """Public attributes of the model itself, by name: the text of plain values, the class of others; and its quantization."""
    for name, value in vars(model).items():
        if not name.startswith("_") and name != "training":
            yield name, repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__qualname__
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is not None:
        settings = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
        yield "config.quantization_config", repr(settings)


def can_checkpoint(model: nn.Module) -> bool:
    """Whether the architecture can be checkpointed: the outermost model says so, and a module carries the flag."""
    flag = "supports_gradient_checkpointing"
    says = next((getattr(m, flag) for m in model.modules() if hasattr(m, flag)), False)
    return bool(says) and any(hasattr(m, "gradient_checkpointing") for m in model.modules())


def embeddings(model: nn.Module) -> list[nn.Module]:
    """Input embeddings of the model and of every model inside it."""
    modules: list[nn.Module] = []
    module: Any
    for module in model.modules():
        with suppress(NotImplementedError, AttributeError):
            embedding = module.get_input_embeddings()
            if isinstance(embedding, nn.Module) and not any(embedding is e for e in modules):
                modules.append(embedding)
    return modules


def heads(model: nn.Module) -> list[nn.Module]:
    """The output head, where the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return [head] if isinstance(head, nn.Module) else []


def layer(name: str, module: nn.Module) -> LayerFacts:
    """One quantized layer, with a digest of each field of its state and of its unpacked weight."""
    recognition, arithmetic = backends.recognition(module), backends.arithmetic(module)
    rows, columns = recognition.shape(module)
    state = state_of(module)
    before = recognition.laid_out_before(module)
    unpacked = _unpacked(module, state)
    multiplies = recognition.multiplies(module)
    computes = arithmetic.compute_dtype(module) if multiplies else arithmetic.unpacked_dtype(module)
    return LayerFacts(
        name=name,
        cls=type(module).__name__,
        scheme=recognition.scheme(module),
        in_features=columns,
        out_features=rows,
        compute=str(computes).removeprefix("torch."),
        multiplies=multiplies,
        experts=recognition.experts(module),
        rounds_input=arithmetic.rounds_input(module),
        input_ulp=arithmetic.input_ulp(module),
        fixed=str(arithmetic.fixed_dtype(module) or "").removeprefix("torch."),
        promises_upcast=backends.promises_upcast(module),
        state=state,
        dequantized=unpacked.digest,
        zero_rows=unpacked.zero_rows,
        laid_out_before="" if before is None else digest.bits(before),
    )


def state_of(module: nn.Module) -> dict[str, str]:
    """A digest of each field of a quantized layer's state."""
    return {k: digest.of(v) for k, v in backends.recognition(module).state(module).items()}


def _stacks(model: nn.Module) -> Iterator[tuple[str, LayerFacts]]:
    """The parameters that pack the weights of several experts, by name."""
    for name, module in model.named_modules():
        for parameter, (scheme, (rows, columns)) in backends.stacks(module).items():
            full = f"{name}.{parameter}"
            yield (
                full,
                LayerFacts(
                    name=full,
                    cls=type(module).__name__,
                    scheme=scheme,
                    in_features=columns,
                    out_features=rows,
                    compute="None",
                    rounds_input=False,
                    state={},
                    dequantized="",
                    stack=True,
                ),
            )


def biases_after_forward(module: nn.Module) -> dict[str, str]:
    """The bits of a quantized layer's bias as a forward may leave it, by dtype."""
    biases = backends.arithmetic(module).biases_after_forward(module)
    return {str(bias.dtype).removeprefix("torch."): digest.bits(bias) for bias in biases}


_digests: dict[object, str] = {}
_weights: dict[object, "_Unpacked"] = {}


class _Unpacked(NamedTuple):
    """Digest of a layer's unpacked weight, and how many of its rows adapters that divide by their norm cannot take."""

    digest: str
    zero_rows: int | None = None


def _unpacked(module: nn.Module, state: Mapping[str, str]) -> _Unpacked:
    recognition, arithmetic = backends.recognition(module), backends.arithmetic(module)
    key = (digest.of(recognition.packed(module)), *state.items())  # all that unpacking goes by
    if key not in _weights:
        try:
            # What is read is compared as numbers: the dtype in which it is read may be another after preparation.
            numbers = arithmetic.unpacked(module, None if recognition.multiplies(module) else torch.float32)
        except Exception as error:  # a layer whose state was broken is a fact, not a crash
            return _Unpacked(f"{type(error).__name__}: {error}")
        _weights[key] = _Unpacked(digest.value(numbers), _zero_rows(numbers))
    return _weights[key]


def _zero_rows(weight: torch.Tensor) -> int | None:
    if weight.is_meta:
        return None
    weight = weight.flatten(0, -2)
    largest = weight.abs().amax(dim=1)  # a norm is at least this, and at most this times the root of the row's length
    small = weight[largest < torch.finfo(weight.dtype).tiny]
    return int((small.double().norm(dim=1) < torch.finfo(weight.dtype).tiny).sum()) if len(small) else 0


def _names(model: nn.Module, modules: list[nn.Module]) -> tuple[str, ...]:
    ids = {id(m) for m in modules}
    return tuple(name for name, module in model.named_modules() if id(module) in ids)


class _Met:
    """The tensors of one snapshot in the order in which they are met; one that several modules hold is read once."""

    def __init__(self) -> None:
        self._storages: dict[object, int] = {}
        self._digests: dict[int, tuple[str, str | None]] = {}

    def storage(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage, so that snapshots of two copies compare."""
        tensor = next(parts(internals.local(tensor)))
        key: object = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if tensor.device.type == "meta":  # where no storage has an address
            key = (internals.storage_id(tensor), tensor.storage_offset())
        elif not tensor.numel():
            key = id(tensor)
        return self._storages.setdefault(key, len(self._storages))

    def digests(self, tensor: torch.Tensor, *, packed: bool) -> tuple[str, str | None]:
        """Of its bits, and of its numbers where it is floating and not packed."""
        if id(tensor) not in self._digests:
            bits, value = digest.bits(tensor), None
            if tensor.is_floating_point() and not packed:
                value = bits if tensor.dtype is torch.float32 else _numbers(tensor, bits)
            self._digests[id(tensor)] = bits, value
        return self._digests[id(tensor)]


def _numbers(tensor: torch.Tensor, bits: str) -> str:
    """Digest of a tensor's numbers, which its bits and its dtype decide."""
    key = (tensor.dtype, bits)
    if key not in _digests:
        _digests[key] = digest.value(tensor)
    return _digests[key]


def _tensor(name: str, tensor: torch.Tensor, met: _Met, *, packed: bool = False, **flags: bool) -> TensorFacts:
    bits, value = met.digests(tensor, packed=packed)
    return TensorFacts(
        name=name,
        cls=type(tensor).__name__,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        device=str(tensor.device),
        requires_grad=tensor.requires_grad,
        storage=met.storage(tensor),
        nbytes=sum(part.nbytes for part in parts(tensor)),
        bits=bits,
        value=value,
        packed=packed,
        has_grad=tensor.is_leaf and tensor.grad is not None,
        **flags,
    )


def _module(name: str, module: nn.Module) -> ModuleFacts:
    block, flag = is_block(module), getattr(module, "gradient_checkpointing", None)
    return ModuleFacts(
        name=name,
        cls=type(module).__name__,
        training=module.training,
        checkpointing=flag if isinstance(flag, bool) else None,
        hooks=tuple(getattr(h, "__qualname__", type(h).__qualname__) for h in internals.forward_hooks(module)),
        norm=norm_evidence(name, module),
        block=block,
        tower=tower(name) if block else "",
        numbers={k: v for k, v in vars(module).items() if type(v) in (int, float) and not k.startswith("_")},
    )


def norm_evidence(name: str, module: nn.Module) -> frozenset[str]:
    """Which of class, name and shape mark a module as a normalization layer.

    By shape: it has a one-dimensional weight, no other tensor but a bias of the same shape, and no children.
    """
    own = dict(module.named_parameters(recurse=False))
    if not own or any(True for _ in module.children()) or backends.is_quantized(module) or is_adapter_module(module):
        return frozenset()
    flat = all(p.dim() == 1 for p in own.values())
    alone = set(own) <= {"weight", "bias", "scale", "gamma", "beta"} and len({p.shape for p in own.values()}) == 1
    evidence = {
        "class": NORM_CLASS.search(type(module).__name__),
        "name": flat and NORM_NAME.search(name),
        "shape": flat and alone,
    }
    return frozenset(k for k, v in evidence.items() if v)


def _config(model: nn.Module) -> Mapping[str, Any]:
    """The configuration, the one that generates, and the attention chosen, which ``to_dict`` leaves out."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    fields = {**config.to_dict(), "attention": internals.attention(config)}
    generates: Any = getattr(model, "generation_config", None)
    if hasattr(generates, "to_dict"):
        fields["generation"] = generates.to_dict()
    return {str(k): _plain(v) for k, v in fields.items()}


def _plain(item: Any) -> Any:
    if isinstance(item, Mapping):
        return {str(k): _plain(v) for k, v in item.items()}
    if isinstance(item, (list, tuple, set)):
        return [_plain(v) for v in item]
    return item if isinstance(item, (str, int, float, bool, type(None))) else str(item)
