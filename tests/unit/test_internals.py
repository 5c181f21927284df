"""Private names of torch and transformers stand in one file a package, and are there in the installed versions."""

from __future__ import annotations

import ast
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers

import kbitcheck
from kbitcheck.models import internals as loading
from kbitcheck.observe import internals

PACKAGE = Path(kbitcheck.__file__).parent
OF_TRANSFORMERS_5 = pytest.mark.transformers5("the name is new there")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.utils.checkpoint", "CheckpointFunction"),
        ("torch.utils.checkpoint", "_checkpoint_without_reentrant_generator"),
        ("torch.utils.checkpoint", "_enable_checkpoint_early_stop"),
        ("torch.utils.checkpoint", "_checkpoint_debug_enabled"),
        ("torch._C", "_len_torch_function_stack"),
        ("torch._C", "_len_torch_dispatch_stack"),
        ("torch._C._autograd", "_top_saved_tensors_default_hooks"),
        ("torch._subclasses.fake_tensor", "FakeTensorMode"),
        ("torch.utils._python_dispatch", "TorchDispatchMode"),
        ("torch.utils._pytree", "tree_map_only"),
        ("torch.nn.modules.module", "_global_forward_hooks"),
        ("torch.nn.modules.module", "_global_forward_pre_hooks"),
        ("torch.nn.modules.module", "_global_backward_hooks"),
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
        ("transformers.activations", "ACT2FN"),
        ("transformers.modeling_rope_utils", "ROPE_INIT_FUNCTIONS"),
        ("transformers.AutoModelForCausalLM", "_model_mapping"),
        ("transformers.PreTrainedModel", "_keep_in_fp32_modules"),
        ("transformers.PreTrainedModel", "_keep_in_fp32_modules_strict"),
        ("transformers.quantizers.base.HfQuantizer", "_process_model_before_weight_loading"),
        ("transformers.PretrainedConfig", "_attn_implementation"),
        pytest.param("transformers.PretrainedConfig", "_experts_implementation", marks=OF_TRANSFORMERS_5),
        pytest.param("transformers.PreTrainedModel", "set_experts_implementation", marks=OF_TRANSFORMERS_5),
        pytest.param("transformers.integrations.finegrained_fp8", "_FINEGRAINED_FP8", marks=OF_TRANSFORMERS_5),
        pytest.param("transformers.integrations.finegrained_fp8", "FineGrainedFP8", marks=OF_TRANSFORMERS_5),
        pytest.param("transformers.integrations.finegrained_fp8", "FP8LinearFunction", marks=OF_TRANSFORMERS_5),
        pytest.param("transformers.integrations.moe", "_can_use_grouped_mm", marks=OF_TRANSFORMERS_5),
    ],
)
def test_a_module_or_class_has_the_name(owner: str, name: str) -> None:
    assert hasattr(resolve_name(owner), name)


@pytest.mark.parametrize(
    "name",
    [
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_parameters",
        "_buffers",
        "_modules",
    ],
)
def test_a_module_of_torch_has_the_dictionary(name: str) -> None:
    assert isinstance(getattr(torch.nn.Linear(1, 1), name), dict)


@pytest.mark.parametrize("name", ["_global_mapping", "_local_mapping"])
def test_a_registry_of_transformers_has_the_mapping(name: str) -> None:
    assert isinstance(getattr(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, name), dict)


def model() -> transformers.PreTrainedModel:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def test_transformers_keeps_the_checkpoint_function_where_it_is_read() -> None:
    llama = model()
    assert {internals.checkpoint_function(m) for m in llama.modules()} in (
        {None},
        {None, torch.utils.checkpoint.checkpoint},
    )
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    flagged = [m for m in llama.modules() if getattr(m, "gradient_checkpointing", False) is True]
    assert flagged
    assert all(internals.checkpoint_function(m) is not None for m in flagged)


def test_transformers_keeps_its_input_hooks_where_they_are_read() -> None:
    llama = model()
    assert not internals.inputs_hooked(llama)
    llama.enable_input_require_grads()
    assert internals.inputs_hooked(llama)


def test_a_configuration_keeps_its_attention_where_it_is_read() -> None:
    config = model().config
    config._attn_implementation = "eager"
    assert internals.attention(config) == "eager"


def test_a_configuration_keeps_the_implementation_where_it_is_chosen() -> None:
    config = model().config
    loading.choose_implementation(config, "eager")
    assert internals.attention(config) == "eager"


def test_an_auto_class_maps_a_configuration() -> None:
    assert loading.mapped_class("AutoModelForCausalLM", transformers.LlamaConfig()) is transformers.LlamaForCausalLM
    assert loading.mapped_class("AutoModelForCausalLM", transformers.PretrainedConfig()) is None


def test_parameters_that_stay_in_float32_are_read_where_transformers_lists_them() -> None:
    llama = model()
    llama._keep_in_fp32_modules, llama._keep_in_fp32_modules_strict = ["wo"], ["norm"]
    assert loading.kept_in_float32(llama, torch.float16) == {"wo", "norm"}
    assert loading.kept_in_float32(llama, torch.bfloat16) == {"norm"}


def test_storages_nodes_and_operators_are_told_apart() -> None:
    x = torch.ones(2, requires_grad=True)
    first, second = x * 2, x * 3
    assert internals.storage_id(x) == internals.storage_id(x.detach()) != internals.storage_id(first)
    assert internals.sequence_number(first.grad_fn) < internals.sequence_number(second.grad_fn)
    assert internals.writes_to_arguments(torch.ops.aten.add_.Tensor)
    assert not internals.writes_to_arguments(torch.ops.aten.add.Tensor)


def test_checkpoints_of_both_modes_pass_through_the_replaced_entries() -> None:
    seen = []

    class Reentrant:
        @staticmethod
        def apply(*args: object) -> object:
            seen.append("reentrant")
            return internals.REENTRANT.apply(*args)

    def non_reentrant(*args: object, **kwargs: object) -> object:
        seen.append("non-reentrant")
        return internals.NON_REENTRANT(*args, **kwargs)

    x = torch.ones(2, requires_grad=True)
    with internals.checkpoint_entries(Reentrant, non_reentrant):
        for mode in (True, False):
            torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=mode)
    assert seen == ["reentrant", "non-reentrant"]


def private_names(source: str) -> list[str]:
    """Private attributes of anything but ``self``, ``cls`` and a case, and imports from private modules of others."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    attributes = [
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute)
        and n.attr.startswith("_")
        and not n.attr.startswith("__")
        and not (isinstance(n.value, ast.Name) and n.value.id in ("self", "cls", "case"))
        and not (isinstance(n.value, ast.Attribute) and ast.unparse(n.value).startswith(("self.", "case.")))
    ]
    imported = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and "._" in n.module]
    return [*attributes, *imported]


@pytest.mark.parametrize("package", ["models", "observe"])
def test_no_other_file_uses_a_private_name(package: str) -> None:
    used = {
        path.name: names
        for path in (PACKAGE / package).rglob("*.py")
        if path.name != "internals.py" and (names := private_names(path.read_text(encoding="utf-8")))
    }
    assert used == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("module._forward_hooks", ["_forward_hooks"]),
        ("from torch._subclasses import fake_tensor", ["torch._subclasses"]),
        ("self._model.forward()", []),
        ("module.__dict__", []),
    ],
)
def test_a_private_name_would_be_seen(source: str, names: list[str]) -> None:
    assert private_names(source) == names
