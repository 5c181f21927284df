"""A cut of a model: the shortest prefix of blocks that holds every kind of block twice, with the model's own weights.

The model itself is cut, not its checkpoint, so that a live model can be cut as well, and nothing is quantized again.
"""

import copy
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kbitcheck import backends
from kbitcheck.core.facts import Tower
from kbitcheck.models import load as loading
from kbitcheck.models.blocks import is_block, is_plain, signature
from kbitcheck.models.vocabulary import Vocabulary, nested
from kbitcheck.models.zoo.shrink import BLOCKS_OF_A_KIND, are_indices, is_depth

Depths = Mapping[tuple[type, int], int]  # by configuration class and number of blocks, how many of them stay


class NoCut(Exception):
    """No cut of a model can be made; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A model with fewer blocks. It shares parameters and buffers with the model that it was made from.

    With fewer tokens it has copies of the first rows of those in ``rows``, by the id of the whole ones.
    """

    model: Any
    towers: tuple[Tower, ...]
    vocabulary: Vocabulary | None = None
    rows: Mapping[int, nn.Parameter] = field(default_factory=dict)

    def dropped(self, whole: nn.Module) -> Iterator[tuple[Tower, nn.Module]]:
        """The blocks of the whole model that the cut does not have, each with its tower."""
        for tower in self.towers:
            yield from ((tower, block) for block in _blocks(whole, tower.name)[tower.kept :])


def _blocks(model: nn.Module, name: str) -> list[nn.Module]:
    """The blocks in the list of that name."""
    return list(model.get_submodule(name).children())


def cut(model: nn.Module, *, uncut: Container[str] = (), vocabulary: Vocabulary | None = None) -> Cut:
    """The cut of a model that has never run, or of one that wraps a model of transformers, as PEFT's do.

    The towers named in ``uncut`` keep all their blocks; of the tokens those of ``vocabulary`` stay.

    Raises:
        NoCut: the cut would be the whole model, or the model cannot be built with fewer blocks.
    """
    prefix, inner = _transformers_model(model)
    stacks = _stacks(inner)
    depths = _depths(inner, [_tower(name, blocks, whole=prefix + name in uncut) for name, blocks in stacks.items()])
    towers = [
        Tower(name=name, kept=depths[_field(inner, name, len(blocks))], total=len(blocks))
        for name, blocks in stacks.items()
    ]
    shorter = [tower for tower in towers if tower.kept < tower.total]
    if not shorter:
        raise NoCut("no tower has more blocks than a cut holds" if towers else "the model has no numbered blocks")
    memo = _shared(inner, shorter)
    root = copy.deepcopy(inner.config, memo)
    _shorten(root, depths, vocabulary)
    whole, built = _built(inner, inner.config), _built(inner, _read_back(root))
    differences, tables = _differences(whole, built, shorter, vocabulary)
    rows = vocabulary.of(model, {prefix + name for name in tables}) if vocabulary else {}
    if rows is None:
        raise NoCut("more than embeddings and head hangs on the number of tokens")
    memo.update(rows)
    for module in inner.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and id(config) not in memo:
            _shorten(copy.deepcopy(config, memo), depths, vocabulary)
    made = copy.deepcopy(model, memo)
    _, cut_inner = _transformers_model(made)
    for tower in shorter:
        del cut_inner.get_submodule(tower.name)[tower.kept :]
    for name, settings in differences.items():
        vars(cut_inner.get_submodule(name)).update(settings)
    named = (Tower(name=prefix + tower.name, kept=tower.kept, total=tower.total) for tower in towers)
    return Cut(model=made, towers=tuple(named), vocabulary=vocabulary, rows=rows)


def _transformers_model(model: nn.Module) -> tuple[str, Any]:
    """The outermost model of transformers inside a model, and its name with a dot behind it ("" where it is the model)."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return (f"{name}." if name else ""), module
    raise NoCut(f"{type(model).__name__} holds no model of transformers")


def _stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """By name, the blocks of each list of blocks that is in no other block."""
    stacks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        parent, _, index = name.rpartition(".")
        if is_block(module) and index.isdecimal() and not any(name.startswith(f"{other}.") for other in stacks):
            blocks = model.get_submodule(parent)
            if isinstance(blocks, nn.ModuleList):
                stacks[parent] = list(blocks)
    return stacks


def _tower(name: str, blocks: Sequence[nn.Module], *, whole: bool) -> Tower:
    if whole:
        return Tower(name=name, kept=len(blocks), total=len(blocks))
    if len(set(map(id, blocks))) < len(blocks):
        raise NoCut(f"{name} runs a block several times")
    kinds = [signature(block) for block in blocks]
    missing = {kind: min(BLOCKS_OF_A_KIND, number) for kind, number in Counter(kinds).items()}
    kept = 0
    while any(number > 0 for number in missing.values()):
        missing[kinds[kept]] -= 1
        kept += 1
    return Tower(name=name, kept=kept, total=len(blocks))


def _depths(model: nn.Module, towers: Sequence[Tower]) -> Depths:
    depths: dict[tuple[type, int], int] = {}
    for tower in towers:
        key = _field(model, tower.name, tower.total)
        depths[key] = max(depths.get(key, 0), tower.kept)
    return depths


def _field(model: nn.Module, tower: str, total: int) -> tuple[type, int]:
    """What tells the field of a configuration that counts a tower's blocks: the configuration's class, and the number.

    A module may have made a configuration of its own from the one that is saved, as Mimi's encoder does: it counts nothing.
    """
    path = tower.split(".")
    owners = [model.get_submodule(".".join(path[:end])) for end in range(len(path) - 1, -1, -1)]
    configs = [config for owner in owners if isinstance(config := getattr(owner, "config", None), PretrainedConfig)]
    saved = set(map(type, nested(configs[-1])))
    return next(type(config) for config in configs if type(config) in saved), total


def _shorten(config: PretrainedConfig, depths: Depths, vocabulary: Vocabulary | None) -> None:
    """Have a configuration, and those inside it, describe fewer blocks, in place: counts of layers and lists by layer."""
    for each in nested(config):
        if vocabulary:
            vocabulary.shorten(each)
        for (cls, total), kept in depths.items():
            if type(each) is cls:
                for name, value in list(vars(each).items()):
                    new = _shortened(name, value, total, kept)
                    if new is not value:
                        setattr(each, name, new)


def _shortened(name: str, value: Any, total: int, kept: int) -> Any:
    if type(value) is int:
        return kept if value == total and is_depth(name) else value
    if isinstance(value, (list, tuple)):
        if are_indices(value, total):
            return type(value)(index for index in value if index < kept)
        return value[:kept] if len(value) == total else value
    if is_dataclass(value) and not isinstance(
        value, (type, PretrainedConfig)
    ):  # settings by layer, as Gemma-4 has them
        new = {f.name: _shortened(f.name, getattr(value, f.name), total, kept) for f in fields(value)}
        return value if all(new[name] is getattr(value, name) for name in new) else replace(value, **new)
    if isinstance(value, dict) and value and all(type(key) is int and 0 <= key < total for key in value):
        return {key: item for key, item in value.items() if key < kept}
    if isinstance(value, str) and name.endswith("_pattern") and len(value) == total:
        return value[:kept]
    return value


def _shared(model: nn.Module, towers: Sequence[Tower]) -> dict[int, Any]:
    """A memo with which a deep copy shares every tensor, and has an empty module for each block that is dropped."""
    states = (backends.recognition(m).state(m).values() for _, m in backends.holders(model))
    tensors = [*model.parameters(), *model.buffers(), *(v for state in states for v in state)]
    memo: dict[int, Any] = {id(t): t for t in tensors if isinstance(t, torch.Tensor)}
    for tower in towers:
        for block in _blocks(model, tower.name)[tower.kept :]:
            memo[id(block)] = nn.Module()
    return memo


def _read_back(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration as it is after saving and loading."""
    try:
        with loading.quiet():
            return type(config).from_dict(config.to_dict())
    except Exception as error:  # its own code may raise anything
        raise NoCut(f"the configuration of fewer blocks is refused ({_line(error)})") from error


def _line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", width=160, placeholder=" ...")


def _built(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module:
    """A model of the class on the meta device."""
    try:
        with loading.quiet():
            return loading.empty(type(model), config)
    except Exception as error:  # the model's own code may raise anything
        raise NoCut(f"{type(model).__name__} cannot be built with fewer blocks ({_line(error)})") from error


def _differences(
    whole: nn.Module, built: nn.Module, towers: Sequence[Tower], vocabulary: Vocabulary | None
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """By module, the settings that depend on the number of blocks, as a model of fewer blocks has them; and the tables of tokens.

    ``whole`` and ``built`` are empty models of both lengths; all else about them has to be the same.
    """
    for tower in towers:
        lengths = [len(_blocks(each, tower.name)) for each in (whole, built)]
        if lengths != [tower.total, tower.kept]:
            raise NoCut(f"the configuration does not say how many blocks {tower.name} has")
    dropped = tuple(f"{tower.name}.{i}." for tower in towers for i in range(tower.kept, tower.total))
    expected = {n: m for n, m in whole.named_modules() if not f"{n}.".startswith(dropped)}
    modules = dict(built.named_modules())
    if odd := sorted(expected.keys() ^ modules.keys()):
        raise NoCut(f"a model of fewer blocks has other modules: {odd[0]}")
    differences: dict[str, dict[str, Any]] = {}
    tables = set()
    for name, module in modules.items():
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            other = getattr(expected[name], key, None)
            if other is not None and vocabulary and vocabulary.is_shorter(other, tensor):
                tables.add(f"{name}.{key}")
            elif other is None or other.shape != tensor.shape:
                raise NoCut(f"{name}.{key} has another shape in a model of fewer blocks")
        ours = vars(expected[name])
        settings = {k: v for k, v in vars(module).items() if _is_setting(v) and repr(v) != repr(ours.get(k))}
        if settings:
            differences[name] = settings
    return differences, tables


def _is_setting(value: Any) -> bool:
    return all(map(is_plain, value)) if isinstance(value, list) else is_plain(value)
