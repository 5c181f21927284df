"""The most that is on the device while a model is loaded, from the order in which transformers reads its tensors."""

import re
from typing import Any

from kbitcheck import backends
from kbitcheck.core.facts import ModelFacts
from kbitcheck.core.facts.fit import LoadingFacts
from kbitcheck.models import internals
from kbitcheck.observe.probes.live import state_tensors

STORED = "a checkpoint that is quantized already is read as it is stored"
QUANTIZED = "it stands beside what it is quantized to; transformers reads one tensor at a time while it quantizes"
JOINED = "it is joined from the checkpoint's tensors, which stand beside it"
PACKED_LATER = "it is packed when all is loaded: until then every stack of experts is there unpacked"
LARGEST = "each tensor is made once, as it stays"


def while_loading(model: Any, facts: ModelFacts, *, stored: bool, dtype: Any) -> LoadingFacts:
    """The peak on an accelerator of a model on the meta device, whose snapshot is ``facts``.

    ``stored`` says that the checkpoint is quantized already, ``dtype`` is that of the weights that are not.
    transformers (core_model_loading.py, ``convert_and_load_state_dict_in_model``, 5.0 to 5.23) sorts the tensors by name,
    and while it quantizes puts one on the device, packs it and frees it before the next. Four threads read a checkpoint
    that is quantized already; all that they read stays. What other modules read unpacked is packed after that.
    """
    joined, tied = internals.joined_parameters(model), internals.tied_parameters(model)
    loaded = sum(t.nbytes for t in {t.storage: t for t in facts.buffers.values()}.values())
    largest = LoadingFacts(peak=loaded, tensor="buffers", how=LARGEST)
    seen: set[int] = set()
    sizes: dict[object, int] = {}
    later: dict[str, int] = {}
    for name in sorted(facts.parameters, key=_natural):
        tensor = facts.parameters[name]
        if tensor.storage in seen or name in tied:
            continue
        seen.add(tensor.storage)
        own, beside, how = tensor.nbytes, 0, LARGEST
        layer = facts.holder(name) if tensor.packed else None
        if layer is not None and not layer.multiplies and not stored:
            own = layer.in_features * layer.out_features * dtype.itemsize
            packing = backends.packing(model.get_submodule(layer.name))
            later[name] = packing.while_quantizing(model.get_submodule(layer.name), dtype) - own
            beside, how = own, JOINED  # stacks are joined of the checkpoint's experts
        elif layer is not None and not layer.stack:
            module = model.get_submodule(layer.name)
            own += sum(t.nbytes for t in state_tensors(module).values())
            key = (layer.scheme, layer.in_features, layer.out_features)
            if not stored:
                if key not in sizes:
                    sizes[key] = backends.packing(module).while_quantizing(module, dtype)
                beside, how = sizes[key] - own, QUANTIZED
        elif joined(name):
            beside, how = tensor.nbytes, JOINED
        at = loaded + own + beside
        if at > largest.peak:
            largest = LoadingFacts(peak=at, tensor=name, how=how)
        loaded += own
    last = max(later, key=lambda name: later[name], default="")
    if later and loaded + later[last] > largest.peak:
        largest = LoadingFacts(peak=loaded + later[last], tensor=last, how=PACKED_LATER)
    return largest if not stored or largest.how == JOINED else LoadingFacts(peak=loaded, tensor="", how=STORED)


def _natural(name: str) -> list[tuple[int, str, int]]:
    """Orders names as transformers does: numbers between and after letters by their value."""
    parts = (re.fullmatch(r"(.*?)(\d*)", part) for part in name.split("."))
    return [(1 if part[1] else 0, part[1], int(part[2] or -1)) for part in parts if part]
