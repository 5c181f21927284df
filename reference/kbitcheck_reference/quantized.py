"""Tell quantized layers and parameters from ordinary ones, by type and state, never by an attribute on the model.

Nothing of a quantization library is imported: its classes are known by name, so that a model of a backend that is not
installed here, or a subclass made by a fork, is recognised all the same.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn

from . import formats

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
    """Whether a parameter's storage is packed or int8 weights rather than plain numbers, of whatever dtype (KB205).

    True for the packed weights of every registered format, whatever their subclass, and for the tensor subclasses of
    torchao, quanto and their like.
    """
    return formats.packs(parameter) or _is_wrapper_of_packed_data(parameter)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer of any known backend; its children are not looked at.

    True where a format recognises a packed weight of the module's own together with its state, where a parameter wraps
    packed data, and for a packed layer of a backend that has no format here. A layer whose weight is not packed yet is
    not quantized.
    """
    return (
        is_foreign_layer(module)
        or formats.of(module) is not None
        or any(_is_wrapper_of_packed_data(parameter) for parameter in module.parameters(recurse=False))
    )


def is_foreign_layer(module: nn.Module) -> bool:
    """Whether a module is a packed layer of a backend without a format here that has its package (gptq, hqq, ...): it fixes its dtypes."""
    form = formats.of(module)
    return (form is None or not form.PACKAGE) and any(_is_foreign_class(base) for base in type(module).__mro__)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` of every quantized layer of ``model``, in the order of registration."""
    return ((name, module) for name, module in model.named_modules() if is_quantized(module))


def _is_foreign_class(cls: type) -> bool:
    path = cls.__module__.split(".")
    if path[0] in {"peft", "torch", *(form.PACKAGE for form in formats.registered())}:
        return False
    if path[0] in _BACKEND_PACKAGES or ".".join(path[:2]) in _BACKEND_PACKAGES:
        return issubclass(cls, nn.Module)
    in_backend_file = path[:2] == ["transformers", "integrations"] and path[-1] in _BACKEND_FILES
    return in_backend_file or _BACKEND_LAYER.fullmatch(cls.__name__) is not None


def _is_wrapper_of_packed_data(parameter: torch.Tensor) -> bool:
    cls = type(parameter)
    # DTensor is a wrapper too, but what it wraps are plain numbers.
    return hasattr(cls, "__tensor_flatten__") and not cls.__module__.startswith("torch.")
