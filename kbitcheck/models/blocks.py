"""The repeated layers of a model that transformers checkpoints one by one, and which of them compute the same."""

import re
import sys
from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

PLACE = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "idx", "training"})

HELD = ("_parameters", "_buffers", "_modules")

Signature = tuple[object, ...]


def is_block(module: nn.Module) -> bool:
    """Whether transformers checkpoints the module as one of its repeated layers; never a container of such layers."""
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def tower(block: str) -> str:
    """The stack a block belongs to: its name without the index."""
    return re.sub(r"\.\d+$", "", block)


def signature(block: nn.Module) -> Signature:
    """Equal for blocks that compute the same on other numbers: classes, settings, hooks, shapes, dtypes and trained parameters.

    A block's place in the stack is left out; a setting that the model derives from it (a window, say) is not.
    """
    return tuple((name, tuple(sorted(described(module).items()))) for name, module in block.named_modules())


def described(module: nn.Module) -> dict[str, str]:
    """What a module itself computes with, but for numbers in tensors and its place: by attribute, a text that compares.

    Two functions have the same text if their code, their defaults and what they close over do; two objects, if their
    classes do.
    """
    own = vars(module)
    texts = {key: _text(value) for key, value in own.items() if key not in PLACE and key not in HELD}
    held = {f"{name} ({kind})": _text(each) for kind in HELD for name, each in own[kind].items()}
    return {**texts, **held, "class": _class_text(type(module))}


def _text(value: Any, depth: int = 4) -> str:
    if is_plain(value):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {value.requires_grad}"
    if not depth:
        return type(value).__qualname__
    inside = partial(_text, depth=depth - 1)
    if isinstance(value, Mapping):
        # Hooks are numbered in the order in which any module of the process got one.
        items = (f"{key}: {inside(v)}" if isinstance(key, str) else inside(v) for key, v in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(inside, value))}]"
    if isinstance(value, partial):
        return f"partial({inside(value.func)}, {inside(value.args)}, {inside(value.keywords)})"
    if isinstance(value, MethodType):
        return f"{type(value.__self__).__qualname__}.{inside(value.__func__)}"
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        code = (value.__code__.co_code.hex(), [c for c in value.__code__.co_consts if is_plain(c)])
        return f"{value.__qualname__} {code} {inside(value.__defaults__ or ())} {inside(cells)}"
    return str(type(value).__qualname__)


def _class_text(cls: type) -> str:
    """The name of a class; of one that was made at run time, also what it defines."""
    name: str = cls.__qualname__
    if getattr(sys.modules.get(cls.__module__), name, None) is cls:
        return name
    own = {name: value for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    return f"{name}({', '.join(map(_class_text, cls.__bases__))}) {list(own)} {_text(own)}"


def is_plain(value: Any) -> bool:
    """True for a number, a text, None, and a tuple of them."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))
