"""Every private name of Python, torch and transformers that observing needs: this file alone uses them.

Each is there in torch 2.11 to 2.13 and in transformers 4.56 and 5.23, but where a line says otherwise.
``tests/unit/test_internals.py`` fails by name where one has moved. A quantizer's own are used in its backend's folder.
"""

import atexit
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map_only, tree_unflatten

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "TreeSpec",
    "keystr",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_map_only",
    "tree_unflatten",
]

aten: Any = torch.ops.aten

# Bound before any implementation is imported, which may patch them.
REENTRANT: Any = torch.utils.checkpoint.CheckpointFunction
NON_REENTRANT: Any = torch.utils.checkpoint._checkpoint_without_reentrant_generator

READ_NUMBER = aten._local_scalar_dense.default
SOFTMAX_BACKWARD = aten._softmax_backward_data.default
CONVERT = aten._to_copy.default
TOPK = aten.topk.default
ARGMAX = aten.argmax.default
RELU = aten.relu.default
FLASH_ATTENTION = aten._scaled_dot_product_flash_attention
EFFICIENT_ATTENTION = aten._scaled_dot_product_efficient_attention
MATH_ATTENTION = aten._scaled_dot_product_attention_math
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default

GLOBAL_HOOKS = tuple(
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global") and isinstance(hooks, dict)
)
OPTIMIZER_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
REGISTRIES = ("ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "ACT2FN", "ROPE_INIT_FUNCTIONS")
REGISTRY_MODULES = ("modeling_utils", "masking_utils", "activations", "modeling_rope_utils")


def checkpoint_entries(reentrant: Any, non_reentrant: Any) -> AbstractContextManager[Any]:
    """Replace what torch's checkpoint calls, for a while: the function of reentrant mode, the generator of the other."""
    return mock.patch.multiple(
        torch.utils.checkpoint, CheckpointFunction=reentrant, _checkpoint_without_reentrant_generator=non_reentrant
    )


def forward_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks of a module itself, and then its forward pre-hooks."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks of a module itself, to be taken off in place: forward, forward pre-, backward, backward pre-hooks."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def hook_count(module: nn.Module) -> int:
    """Number of forward, forward pre- and backward hooks of a module itself."""
    return len(forward_hooks(module)) + len(module._backward_hooks)


def has_backward_pre_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks that may change the gradient of its output."""
    return bool(module._backward_pre_hooks)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters, to be replaced in place."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The module's own buffers, to be replaced in place."""
    return module._buffers


def replace_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Put another module in a child's place, also in a container that checks types."""
    parent._modules[name] = child


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, for as long as the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place."""
    return int(tensor._version)


def sequence_number(node: Any) -> int:
    """The place of an autograd node in the order in which nodes were made."""
    return int(node._sequence_nr())


def fake_like(
    example: FakeTensor,
    shape: Sequence[int],
    stride: Sequence[int],
    offset: int,
    dtype: torch.dtype,
    storage: torch.UntypedStorage | None,
) -> FakeTensor:
    """A fake tensor of the example's mode and device: a view of a fake storage, or, without one, of a storage of its own.

    Equals what the class itself makes, which takes several times as long.
    """
    with torch._C._DisableTorchDispatch():
        if storage is None:
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            meta = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, shape, stride)
    tensor = torch.Tensor._make_subclass(
        FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=example.fake_device
    )
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    vars(tensor).update(vars(example))
    return tensor


def python_threads() -> list[threading.Thread]:
    """The threads that Python started: torch's own, which calls hooks of a backward on a GPU, is a dummy."""
    return [thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)]


def exit_callbacks() -> int:
    """Number of functions that run when the process exits."""
    return atexit._ncallbacks()


def quiet_fake_tensors() -> AbstractContextManager[Any]:
    """Torch logs no traceback of an operator that fails on fake tensors, for a while: the exception has all."""
    return mock.patch.object(logging.getLogger(FakeTensor.__module__), "disabled", True)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps a module, or compiled it in place."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def backward_runs() -> bool:
    """Whether this thread is inside a backward, so that a forward is a checkpoint's recompute."""
    return torch._C._current_graph_task_id() != -1


def tensor_that_computes_as(cls: type, stored: torch.Tensor, dtype: torch.dtype) -> Any:
    """A tensor of a subclass without numbers of its own, of the shape, strides and device of ``stored``."""
    return torch.Tensor._make_wrapper_subclass(
        cls, stored.shape, strides=stored.stride(), dtype=dtype, device=stored.device
    )


def writes_to_arguments(operator: Any) -> bool:
    """Whether an operator changes one of its arguments in place."""
    return bool(operator._schema.is_mutable)


def checkpoint_function(module: nn.Module) -> Callable[..., Any] | None:
    """What transformers checkpoints a module's blocks with; None where checkpointing was never enabled."""
    function = vars(module).get("_gradient_checkpointing_func")
    return cast("Callable[..., Any] | None", function)


def checkpoint_keywords(model: nn.Module) -> dict[str, Any] | None:
    """The arguments that transformers keeps for torch's checkpoint, where it is torch's function that is kept; else None."""
    kept = next(filter(None, map(checkpoint_function, model.modules())), None)
    return dict(kept.keywords) if isinstance(kept, partial) and kept.func is torch.utils.checkpoint.checkpoint else None


def set_checkpoint_function(module: nn.Module, function: Callable[..., Any] | None) -> None:
    """Have a module's blocks checkpointed with another function; None removes it."""
    if function is None:
        vars(module).pop("_gradient_checkpointing_func", None)
    else:
        module._gradient_checkpointing_func = function  # type: ignore[assignment]


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold a part of the model's parameters, so that a step waits for them: FSDP of either version."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return is_flattened(model) or any(isinstance(p, DTensor) for p in model.parameters())


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP of the first version keeps the model's parameters, which its layers then see as parts of flat ones."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(m, module.FullyShardedDataParallel) for m in model.modules())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that several hold; any other tensor itself. No other process is waited for."""
    module = sys.modules.get("torch.distributed.tensor")  # without it nothing is sharded
    if module is not None and isinstance(tensor, module.DTensor):
        part: torch.Tensor = tensor.to_local()
        return part
    return tensor


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def averaged(wrap: nn.parallel.DistributedDataParallel) -> set[int]:
    """The ids of the parameters whose gradients the wrap averages over its processes."""
    return {id(parameter) for parameter in wrap._module_parameters}


def compiled_from(model: Any) -> Any:
    """The model that ``torch.compile`` wrapped; any other model itself."""
    return getattr(model, "_orig_mod", model)


def inputs_hooked(model: nn.Module) -> bool:
    """Whether ``enable_input_require_grads`` was called: ``_require_grads_hooks`` since transformers 5."""
    return hasattr(model, "_require_grads_hook") or hasattr(model, "_require_grads_hooks")


def attention(config: Any) -> str | None:
    """The attention that a configuration chooses, which its ``to_dict`` leaves out."""
    return cast("str | None", getattr(config, "_attn_implementation", None))


def choose_attention(config: Any, name: str) -> None:
    """Have a model compute attention by ``name``, in all its towers, whether the package for it is here or not."""
    for each in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))):
        if each is not None:
            each._attn_implementation_internal = name


def attention_functions() -> dict[str, Any]:
    """Transformers' functions of attention by name, to be replaced in place."""
    functions: dict[str, Any] = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS._global_mapping
    return functions


def attention_is_supported(model: Any, name: str) -> bool:
    """Whether a model's class computes attention by ``name``: ``_supports_flash_attn_2`` was its name before."""
    flags = {"sdpa": ("_supports_sdpa",), "flash_attention_2": ("_supports_flash_attn", "_supports_flash_attn_2")}
    return any(getattr(model, flag, False) for flag in flags[name]) if name in flags else True


def kept_in_float32(model: nn.Module) -> tuple[str, ...]:
    """The parts of names of parameters that transformers' classes keep in float32."""
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return tuple(sorted({part for m in model.modules() for each in lists for part in getattr(m, each, None) or ()}))


def forward_is_wrapped(module: nn.Module) -> bool:
    """Whether accelerate wrapped the module's ``forward``, as it does for mixed precision. Seen in accelerate 1.15."""
    return "_original_forward" in vars(module)


def registered() -> Iterator[tuple[str, str, int]]:
    """What transformers looks up by name at run time: registry, key and identity of each entry."""
    for module in REGISTRY_MODULES:
        for name in REGISTRIES:
            registry = getattr(sys.modules.get(f"transformers.{module}"), name, None)
            inner = (getattr(registry, "_global_mapping", None), getattr(registry, "_local_mapping", None))
            for mapping in (registry, *inner):
                if isinstance(mapping, dict):
                    yield from ((name, str(key), id(value)) for key, value in mapping.items())


def without_grouped_kernel() -> AbstractContextManager[Any]:
    """Experts by transformers' own grouped product, for a while; it has none before transformers 5."""
    try:
        from transformers.integrations import moe
    except ImportError:
        return nullcontext()
    return mock.patch.object(moe, "_can_use_grouped_mm", return_value=False)


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd knows the tensor as a view of another."""
    return bool(tensor._is_view())


def operator(name: str) -> Any:
    """The operator of aten of that name, with its overload: ``mm``, ``softmax.int``."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def argument_names(operator: Any) -> list[str]:
    """The names of an operator's arguments, in order."""
    return [argument.name for argument in operator._schema.arguments]


def autocast_operators(device: str) -> frozenset[str]:
    """Names of aten's operators that autocast handles on ``CPU`` or ``CUDA``, whether this torch has CUDA or not."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{device}")
    return frozenset(name.removeprefix("aten::") for name in names if name.startswith("aten::"))


def below_autocast() -> AbstractContextManager[Any]:
    """Operators called inside are not cast by the CPU's autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(key)


@contextmanager
def autocast_kernels(kernels: Iterable[tuple[str, Callable[..., Any] | None]]) -> Iterator[None]:
    """Replace what the CPU's autocast does for operators of aten, for a while; None: nothing."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced
            for name, kernel in kernels:
                library.impl(name, kernel or torch.library.fallthrough_kernel)
        yield
    finally:
        library._destroy()


def as_text(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Arguments of a call in words that are the same in each process: a function by its name."""
    return {str(name): getattr(value, "__qualname__", str(value)) for name, value in arguments.items()}
