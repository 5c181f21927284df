"""Turns any configuration class of transformers into a tiny valid one, by the names and defaults of its fields.

A field's name says how large it may be, and a default that is already smaller stays. The caps fit each other: 4 heads
of 16 make a hidden size of 64, and so on. Lists with an entry for each layer are cut so that every kind of layer comes
twice. The caps are in ``caps.toml``, exceptions by family in ``families.toml``.
"""

import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Fields = dict[str, Any]

VOCABULARY = 320
HEADS = 4
BLOCKS_OF_A_KIND = 2
MOST_KINDS = 4

DEPTH = re.compile(r"(num_|n_)?(.*_)?layers?|num_blocks|depths?|.*_depth|num_self_attends_per_block")
NO_DEPTH = re.compile(
    r"(use|is|num_ln|num_kv|every|no|first|mtp|num_dense|num_nextn|feature|n_layers_per).*|.*(feature|idx|drop)_?layer.*"
)
LAYER_KINDS = re.compile(r"layers?_(block_)?types?")
PERIOD = re.compile(r".*_(period|interval|pattern|step|every_n_layers)")
OFFSET = re.compile(
    r".*_offset|first_k_dense_replace|num_dense_layers|num_kv_shared_layers|num_nextn.*|num_mtp_layers|insert_layer_id"
)
KEY_VALUE_HEADS = re.compile(r".*(key_value|kv|key)_heads|num_query_groups")
QUERY_HEADS = re.compile(r".*(attention|query|value|n|num)_heads?")
TOKEN = re.compile(r"(?!num_).*(token_ids?|token_index|_tokens|patch_id)|im_.*_id|(unk|mask)_index")

# What a default configuration leaves open and some models of the same library then trip over.
OPEN = {
    "head_dim": 16,
    "num_key_value_heads": HEADS,
    "image_token_id": VOCABULARY - 32,
    "image_token_index": VOCABULARY - 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
NEEDED = ("pad_token_id", "eos_token_id")
SKIP = "skip"  # in families.toml no field, but the modules that quantizing has to leave alone


def tiny(cls: type[PretrainedConfig], *, decoder: bool = False) -> Fields:
    """Keyword arguments that make a tiny configuration of this class, with its ``model_type``; JSON-able.

    Sub-configurations are dictionaries of the same kind. A special token that lies outside the tiny vocabulary moves to
    its end, to the same place in every part. ``decoder`` makes a decoder of what can be encoder or decoder.
    """
    fields = _Shrinker().fields(cls(), {})
    return {**fields, "is_decoder": True} if decoder and "is_decoder" in _parameters(cls) else fields


class _Shrinker:
    def __init__(self) -> None:
        self._moved: dict[int, int] = {}

    def fields(self, default: PretrainedConfig, overrides: Mapping[str, Any]) -> Fields:
        overrides = {**families().get(default.model_type, {}), **overrides}
        overrides.pop(SKIP, None)
        # A part that the default leaves open is of the type that families.toml tells.
        values = {name: _part(overrides.get(name)) if v is None else v for name, v in _values(default).items()}
        fixed = {k: v for k, v in overrides.items() if not isinstance(values.get(k), PretrainedConfig)}
        left_out = _values(type(default)())  # a part's default within the whole need not be the default of its class
        layers, depth = _layers(values), _depth(values)
        fields: Fields = {"model_type": default.model_type}
        for name, value in values.items():
            if isinstance(value, PretrainedConfig):
                fields[name] = self.fields(value, overrides.get(name) or {})
            elif name not in overrides:
                new = self._field(name, value, values, layers, depth)
                if new != left_out.get(name):
                    fields[name] = new
        if "vocab_size" in values:
            fields |= {k: OPEN[k] for k in NEEDED if values.get(k) is None}
        if values.get("is_encoder_decoder") or getattr(default, "is_encoder_decoder", False):
            fields.setdefault("decoder_start_token_id", values.get("decoder_start_token_id") or 0)
        return {**fields, **fixed}

    def _field(self, name: str, value: Any, values: Fields, layers: int, depth: int) -> Any:
        if value is None:
            return OPEN.get(name)
        if TOKEN.fullmatch(name):
            return self._token(value)
        if isinstance(value, list | tuple):
            if are_indices(value, layers):
                return [v for v in value if v < depth] or [depth - 1]
            # What is inside an entry is no list with an entry for each layer.
            return _cut([self._field(name, v, values, 0, depth) for v in value], name, layers, depth)
        if type(value) is not int:
            return value
        if is_depth(name):
            return min(value, depth)
        if PERIOD.fullmatch(name):
            return min(value, 2)
        if OFFSET.fullmatch(name):
            return min(value, 1)
        if KEY_VALUE_HEADS.fullmatch(name):
            return min(value, HEADS if value in _query_heads(values) else HEADS // 2)
        return min(value, next((cap for pattern, cap in caps().items() if re.fullmatch(pattern, name)), value))

    def _token(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._token(v) for v in value]
        if type(value) is not int or value < VOCABULARY:
            return value
        return self._moved.setdefault(value, VOCABULARY - 1 - len(self._moved))


def is_depth(name: str) -> bool:
    """Whether a configuration's field of this name counts layers."""
    return bool(DEPTH.fullmatch(name)) and not NO_DEPTH.fullmatch(name)


def _layers(values: Fields) -> int:
    depths = (v for k, v in values.items() if is_depth(k) and type(v) is int)
    # Some count their layers by naming the kind of each.
    named = (len(v) for k, v in values.items() if LAYER_KINDS.fullmatch(k) and isinstance(v, list | tuple))
    return max(depths, default=0) or max(named, default=0)


def _depth(values: Fields) -> int:
    """Blocks enough for each kind of layer to come twice."""
    layers = _layers(values)
    lists = [v for v in values.values() if isinstance(v, list | tuple) and v]
    kinds = [len(_kinds(v)) for v in lists if len(v) == layers and not are_indices(v, layers)]
    kinds += [len(v) for k, v in values.items() if k.endswith("types") and v in lists and len(v) < layers]
    if any(PERIOD.fullmatch(k) and isinstance(v, int) and v > 1 for k, v in values.items()):
        kinds.append(2)
    return BLOCKS_OF_A_KIND * min(max(kinds, default=1), MOST_KINDS)


def _query_heads(values: Fields) -> set[int]:
    heads = {k: v for k, v in values.items() if QUERY_HEADS.fullmatch(k) and not KEY_VALUE_HEADS.fullmatch(k)}
    return {v for v in heads.values() if isinstance(v, int)}


def _kinds(values: Sequence[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _cut(values: Sequence[Any], name: str, layers: int, depth: int) -> list[Any]:
    """A list with an entry for each layer, for fewer layers; any other list as it is."""
    if len(values) != layers or layers <= depth:
        return list(values)
    kinds = _kinds(values)[:depth]
    if name.startswith("mlp"):  # in runs, so that each kind meets each kind of attention
        runs = [kind for kind in kinds for _ in range(-(-depth // len(kinds)))]
        return runs[:depth]
    return (kinds * depth)[:depth]


def are_indices(values: Sequence[Any], layers: int) -> bool:
    """Whether a field names some of so many layers by index."""
    plain = all(type(v) is int for v in values)
    return plain and len(values) > 1 and list(values) == sorted(set(values)) and values[-1] < layers


def _values(config: PretrainedConfig) -> Fields:
    """The values of a configuration's own fields, by the names that its constructor takes."""
    stored = vars(config)  # attributes refuse to be read where layers have values of their own
    names = {name: config.attribute_map.get(name, name) for name in sorted(_parameters(type(config)))}
    return {name: stored.get(inner, stored.get(name)) for name, inner in names.items()}


def _part(overrides: Any) -> PretrainedConfig | None:
    kind = overrides.get("model_type") if isinstance(overrides, Mapping) else None
    return None if kind is None else CONFIG_MAPPING[kind]()


def _parameters(cls: type[PretrainedConfig]) -> frozenset[str]:
    """The fields a class adds to those that every configuration has."""
    own = set(inspect.signature(cls.__init__).parameters)
    common = set(inspect.signature(PretrainedConfig.__init__).parameters)
    return frozenset((own - common | {*own & OPEN.keys()}) - {"self", "args", "kwargs"})


@cache
def families() -> Mapping[str, Mapping[str, Any]]:
    """By model type, the fields that names and defaults get wrong."""
    return tomllib.loads((files("kbitcheck.models.zoo") / "families.toml").read_text(encoding="utf-8"))


@cache
def caps() -> Mapping[str, int]:
    """The largest value by the pattern of a field's name, in the order in which patterns are tried."""
    return tomllib.loads((files("kbitcheck.models.zoo") / "caps.toml").read_text(encoding="utf-8"))
