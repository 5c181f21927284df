"""Tell quantized layers and parameters from ordinary ones, by type and state, never by an attribute on the model.

Nothing of a quantization library is imported: its classes are known by name, so that a model of a backend that is not
installed here, or a subclass made by a fork, is recognised all the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

BITSANDBYTES_PARAMETERS = frozenset({"Params4bit", "Int8Params"})
_STATE_ATTRIBUTES = ("quant_state", "SCB", "CB")

# Packages whose modules and tensor classes exist only to hold packed weights.
_BACKEND_PACKAGES = frozenset(
    {
        "aqlm", "auto_gptq", "auto_round", "awq", "compressed_tensors", "eetq", "gptqmodel", "hqq",
        "optimum.quanto", "quanto", "quark", "spqr_quant", "torchao", "vptq",
    }
)  # fmt: skip
_BACKEND_FILES = frozenset(
    {
        "aqlm", "awq", "bitnet", "compressed_tensors", "eetq", "fbgemm_fp8", "finegrained_fp8", "fouroversix",
        "fp_quant", "gemma_quant", "higgs", "hqq", "metal_quantization", "mxfp4", "nvfp4", "quanto", "sinq", "spqr",
        "torchao", "vptq",
    }
)  # fmt: skip
_BACKEND_LAYER = re.compile(
    r"\w*QuantLinear|WQLinear\w*|HQQLinear|(Eetq|EETQ)Linear|W8A16Linear|QuantizedLinear|QModuleMixin|QLinear|CompressedLinear"
    r"|(Fbgemm)?(FP8|Fp8)(Linear|Experts|Llama4TextExperts)|CompressedTensorsFP8Linear|Mxfp4\w+|NVFP4Linear|HiggsLinear"
    r"|(Auto)?BitLinear|VQuantLinear|FPQuantLinear|SINQLinear|Int8DynActInt4WeightLinear"
)


def is_quantized_parameter(parameter: torch.Tensor) -> bool:
    """Whether a parameter's storage is packed or int8 weights rather than plain numbers (KB205).

    Args:
        parameter: any tensor registered as a parameter; any dtype, as ``bnb_4bit_quant_storage`` may be a float.

    Returns:
        True for bitsandbytes' ``Params4bit`` and ``Int8Params`` and their subclasses, for whatever carries a
        ``quant_state``, ``SCB`` or ``CB``, and for the tensor subclasses of torchao, quanto and their like.
    """
    if any(base.__name__ in BITSANDBYTES_PARAMETERS for base in type(parameter).__mro__):
        return True
    if any(getattr(parameter, name, None) is not None for name in _STATE_ATTRIBUTES):
        return True
    return _is_wrapper_of_packed_data(parameter)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer of any known backend.

    Args:
        module: any module; its children are not looked at.

    Returns:
        True where a parameter it owns is quantized, or where it is a packed layer of a backend other than bitsandbytes.
        An unquantized bitsandbytes layer (``has_fp16_weights=True``, or packed data not yet made) is not quantized.
    """
    if is_foreign_layer(module):
        return True
    for parameter in module.parameters(recurse=False):
        if _is_wrapper_of_packed_data(parameter):
            return True
        if is_quantized_parameter(parameter) and _has_packed_state(module, parameter):
            return True
    return False


def is_foreign_layer(module: nn.Module) -> bool:
    """Whether a module is a packed layer of a backend other than bitsandbytes; its kernels fix its dtypes.

    Args:
        module: any module.

    Returns:
        True for the layer classes of gptq, awq, hqq, torchao, eetq, aqlm, quanto, fp8, mxfp4 and their like.
    """
    return any(_is_foreign_class(base) for base in type(module).__mro__)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` of every quantized layer of ``model``, in the order of registration."""
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def _is_foreign_class(cls: type) -> bool:
    path = cls.__module__.split(".")
    if path[0] in ("peft", "torch", "bitsandbytes"):
        return False
    if path[0] in _BACKEND_PACKAGES or ".".join(path[:2]) in _BACKEND_PACKAGES:
        return issubclass(cls, nn.Module)
    in_backend_file = path[:2] == ["transformers", "integrations"] and path[-1] in _BACKEND_FILES
    return in_backend_file or _BACKEND_LAYER.fullmatch(cls.__name__) is not None


def _is_wrapper_of_packed_data(parameter: torch.Tensor) -> bool:
    cls = type(parameter)
    # DTensor is a wrapper too, but what it wraps are plain numbers.
    return hasattr(cls, "__tensor_flatten__") and not cls.__module__.startswith("torch.")


def _has_packed_state(module: nn.Module, parameter: torch.Tensor) -> bool:
    if getattr(parameter, "quant_state", None) is not None or getattr(module, "quant_state", None) is not None:
        return True
    return parameter.dtype == torch.int8
