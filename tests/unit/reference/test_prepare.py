"""The reference preparation keeps the specification's MUST and SHOULD, one test a promise."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.utils.checkpoint
from kbitcheck_reference import is_quantized_parameter, lora, prepare_model_for_kbit_training
from kbitcheck_reference.prepare import return_cache
from torch import nn

from tests.unit.reference.drawing import draw_up

if TYPE_CHECKING:
    from collections.abc import Callable

    Load = Callable[..., Any]
    Snapshot = Callable[[nn.Module], dict[str, Any]]
    Gradients = Callable[..., dict[str, torch.Tensor]]

prepare = prepare_model_for_kbit_training
MODES = pytest.mark.parametrize("reentrant", [False, True])
ARCHS = pytest.mark.parametrize("arch", ["llama", "t5", "opt", "gpt2"])
QUANTS = pytest.mark.parametrize("quantization", ["nf4-double", "int8"])
PEFT_IS_NOT_QUIET = pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:`is_gradient_checkpointing`")
INPUT_HOOKS = {"output_requires_grad", "tower_input_requires_grad", "make_inputs_require_grads"}


def flags(model: nn.Module) -> list[bool]:
    return [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]  # type: ignore[misc]


def keywords(model: nn.Module) -> list[dict[str, Any]]:
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    return [function.keywords for function in functions if function is not None]


def input_hooks(model: nn.Module) -> dict[str, list[str]]:
    found = {}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        names = [hook.__name__ for hook in hooks if getattr(hook, "__name__", "") in INPUT_HOOKS]
        if names:
            found[name] = names
    return found


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_has_the_promised_signature() -> None:
    parameters = inspect.signature(prepare).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "model": inspect.Parameter.empty,
        "use_gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": None,
    }


@ARCHS
@QUANTS
def test_freezes_and_casts_exactly_what_is_unquantized(
    load: Load, snapshot: Snapshot, arch: str, quantization: str
) -> None:
    model = load(arch, quantization)
    objects = dict(model.named_parameters())
    old_values = {name: parameter.detach().clone() for name, parameter in objects.items()}
    before, keys = snapshot(model), list(model.state_dict())

    assert prepare(model) is model

    assert trainable(model) == set()
    after = snapshot(model)
    assert list(model.state_dict()) == keys
    packed = [name for name, parameter in objects.items() if is_quantized_parameter(parameter)]
    assert len(packed) >= 8
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        if name in packed:
            assert after[name] == (*before[name][:4], False)
        else:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, old_values[name].to(torch.float32))
    for name, _ in model.named_buffers():
        assert after[name] == before[name]


def test_leaves_other_dtypes_alone(load: Load, snapshot: Snapshot) -> None:
    model = load("llama")
    model.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
    model.single = nn.Parameter(torch.randn(3))
    model.count = nn.Parameter(torch.arange(3), requires_grad=False)
    model.tiny = nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
    model.register_buffer("half_buffer", torch.randn(3).half())
    before = snapshot(model)

    after = snapshot(prepare(model))

    for name in ("wide", "single", "count", "tiny"):
        assert after[name][:3] == before[name][:3]
    assert after["half_buffer"] == before["half_buffer"]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_packed_weights_survive_in_every_storage_dtype(load: Load, snapshot: Snapshot, storage: torch.dtype) -> None:
    model = load("llama", bnb_4bit_quant_storage=storage)
    name = "model.layers.1.mlp.up_proj.weight"
    before = snapshot(model)[name]
    assert before[1] == storage
    assert snapshot(prepare(model))[name] == (*before[:4], False)


def test_tied_embeddings_stay_tied(load: Load) -> None:
    model = load("opt")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    prepare(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.float32


def test_drops_gradients_of_what_it_freezes(load: Load) -> None:
    model = load("llama")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    assert prepare(model).lm_head.weight.grad is None


@ARCHS
@MODES
def test_second_call_changes_nothing(load: Load, snapshot: Snapshot, arch: str, reentrant: bool) -> None:
    arguments = {"use_reentrant": reentrant}
    model = prepare(load(arch), True, arguments)
    before = snapshot(model)
    assert snapshot(prepare(model, True, arguments)) == before
    assert all(flags(model))


@ARCHS
@MODES
def test_one_hook_an_embedding_and_none_after_disable(load: Load, arch: str, reentrant: bool) -> None:
    model = load(arch)
    model.enable_input_require_grads()
    model.enable_input_require_grads()  # the first hook's handle is lost, and transformers cannot remove it again

    prepare(prepare(model), True, {"use_reentrant": reentrant})

    hooks = input_hooks(model)
    assert set(map(len, hooks.values())) == {1}
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    assert hooks[embedding] == ["output_requires_grad"]
    hooked = [model.get_submodule(name) for name in hooks if hooks[name] == ["output_requires_grad"]]
    assert all(isinstance(module, nn.Embedding) for module in hooked)
    model.disable_input_require_grads()
    assert input_hooks(model) == {}
    model.disable_input_require_grads()


@pytest.mark.transformers5("hooks of a block run inside its checkpoint")
@pytest.mark.parametrize(("arch", "towers"), [("llama", 1), ("t5", 2), ("whisper", 2), ("wav2vec2", 2), ("vit", 1)])
def test_every_tower_gets_inputs_that_require_grad(load: Load, batch: Any, arch: str, towers: int) -> None:
    model = prepare(load(arch), True, {"use_reentrant": True}).train()
    seen = []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        seen.append(any(t.requires_grad for t in given))

    for module in model.modules():
        if "tower_input_requires_grad" in [getattr(h, "__name__", "") for h in module._forward_pre_hooks.values()]:
            module.register_forward_pre_hook(look, with_kwargs=True)
    model(**batch(arch))
    assert seen == [True] * towers
    model.disable_input_require_grads()
    assert input_hooks(model) == {}


def test_given_input_embeddings_are_not_changed(load: Load) -> None:
    model = prepare(load("llama"), True, {"use_reentrant": True}).train()
    lora.attach(model)
    embeds = torch.randn(1, 4, 64)
    loss = model(inputs_embeds=embeds, labels=torch.arange(4)[None]).loss
    loss.backward()
    assert not embeds.requires_grad
    assert next(iter(lora.layers(model).values())).lora_B.weight.grad.abs().max() > 0


def test_hooks_do_nothing_without_grad(load: Load, batch: Any) -> None:
    model = prepare(load("llama")).train()
    outputs = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(**batch("llama"))
    with torch.inference_mode():
        model(**batch("llama"))
    model(**batch("llama"))
    assert [output.requires_grad for output in outputs] == [False, False, True]


@MODES
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5", "whisper", "wav2vec2", "vit"])
def test_checkpointing_changes_no_gradient(
    load: Load, gradients: Gradients, arch: str, quantization: str, reentrant: bool
) -> None:
    if arch == "whisper" and reentrant and version("transformers") < "5":
        pytest.skip("the encoder's states go to the decoder's blocks by keyword, past a reentrant checkpoint")
    model = lora.attach(prepare(load(arch, quantization), True, {"use_reentrant": reentrant}))
    draw_up(model, seed=1)
    got = gradients(model, arch)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    plain = gradients(model, arch)
    assert set(got) == set(plain) == set(lora.parameters(model))
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        # Where several blocks read one tensor, its gradient is summed in another order.
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_blocks_recompute(load: Load, gradients: Gradients) -> None:
    model = lora.attach(prepare(load("llama")))
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, index=index: calls.append(index))
    gradients(model, "llama")
    assert calls == [0, 1, 1, 0]


def test_use_reentrant_is_explicit_and_the_callers_arguments_win(load: Load) -> None:
    assert all(found == {"use_reentrant": False} for found in keywords(prepare(load("llama"))))
    given = {"preserve_rng_state": False, "use_reentrant": True}
    model = prepare(load("llama"), gradient_checkpointing_kwargs=given)
    assert keywords(model)
    assert all(found == {"preserve_rng_state": False, "use_reentrant": True} for found in keywords(model))
    only_other = {"preserve_rng_state": False}
    assert keywords(prepare(load("llama"), True, only_other))[0] == {"use_reentrant": False, **only_other}
    assert only_other == {"preserve_rng_state": False}
    assert given == {"preserve_rng_state": False, "use_reentrant": True}


def test_not_asked_for_turns_nothing_on(load: Load) -> None:
    model = prepare(load("llama"), False)
    assert not any(flags(model))
    assert input_hooks(model) == {}
    assert model.model.norm.weight.dtype == torch.float32


def test_not_asked_for_leaves_what_was_on(load: Load) -> None:
    model = prepare(load("llama"))
    hooks = input_hooks(model)
    prepare(model, False)
    assert all(flags(model))
    assert input_hooks(model) == hooks


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_refuses_before_changing_anything(load: Load, snapshot: Snapshot, quantization: str | None) -> None:
    model = load("ctrl", quantization)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"CTRLLMHeadModel .*use_gradient_checkpointing=False"):
        prepare(model)
    assert snapshot(model) == before
    assert trainable(prepare(model, False)) == set()


def test_refuses_a_module_that_knows_no_checkpointing() -> None:
    model = nn.Sequential(nn.Linear(2, 2).half())
    with pytest.raises(ValueError, match=r"Sequential .*use_gradient_checkpointing=False"):
        prepare(model)
    assert model[0].weight.dtype == torch.float16
    assert model[0].weight.requires_grad


class Wrapper(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)


def test_wrapped_model_is_prepared_too(load: Load) -> None:
    wrapper = Wrapper(text=load("llama"), value_head=nn.Linear(64, 1).bfloat16())
    assert prepare(wrapper) is wrapper
    assert trainable(wrapper) == set()
    assert wrapper.parts["value_head"].weight.dtype == torch.float32
    assert all(flags(wrapper))
    assert sorted(input_hooks(wrapper).values()) == [["output_requires_grad"], ["tower_input_requires_grad"]]


def test_changes_nothing_when_a_model_refuses_late() -> None:
    class Refusing(OldModel):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
            raise RuntimeError("no")

    model = Refusing().half()
    with pytest.raises(RuntimeError, match="no"):
        prepare(model)
    assert trainable(model) == {"embedding.weight"}
    assert model.embedding.weight.dtype == torch.float16


def test_a_part_without_quantized_layers_may_lack_checkpointing(load: Load) -> None:
    wrapper = prepare(Wrapper(helper=load("ctrl", None), text=load("llama")))
    assert all(flags(wrapper.parts["text"]))
    with pytest.raises(ValueError, match="CTRLLMHeadModel"):
        prepare(Wrapper(helper=load("ctrl"), text=load("llama")))


def test_leaves_modes_config_and_global_state(load: Load) -> None:
    model = load("t5")
    model.eval()
    model.decoder.block[1].train()
    modes = [module.training for module in model.modules()]
    config = model.config.to_dict()

    def everything() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled(),
            list(warnings.filters), torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    state = everything()
    prepare(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert everything() == state


@ARCHS
def test_is_quiet(load: Load, batch: Any, arch: str) -> None:
    model = load(arch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(model, True, {"use_reentrant": True})
        prepare(model).train()
    assert [str(warning.message) for warning in caught] == []


def test_prepared_model_can_be_pickled_and_copied(load: Load) -> None:
    model = prepare(load("llama", "int8"))
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert input_hooks(twin) == input_hooks(model)
        twin.disable_input_require_grads()
        assert input_hooks(twin) == {}
    assert input_hooks(model)


def test_own_adapters_stay_trainable(load: Load) -> None:
    model = lora.attach(load("llama"), dtype=torch.bfloat16)
    names = trainable(model)
    prepare(prepare(model))
    assert names == trainable(model) == set(lora.parameters(model))
    assert {parameter.dtype for parameter in lora.parameters(model).values()} == {torch.float32}


@PEFT_IS_NOT_QUIET
@pytest.mark.parametrize("bias", ["none", "all"])
def test_adapters_of_peft_stay_trainable(load: Load, gradients: Gradients, bias: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], bias=bias)
    model = peft.get_peft_model(load("opt"), config)
    names = trainable(model)
    assert any("modules_to_save" in name for name in names)
    assert any(name.endswith("fc1.bias") for name in names) == (bias == "all")

    prepare(model, True, {"use_reentrant": True})

    assert trainable(model) == names
    assert all(flags(model))
    assert all(gradient.isfinite().all() for gradient in gradients(model, "opt").values())


@PEFT_IS_NOT_QUIET
def test_base_that_peft_never_froze_is_frozen_round_the_adapters(load: Load) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load("opt"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    adapters = trainable(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    prepare(model)
    assert trainable(model) == adapters


@PEFT_IS_NOT_QUIET
def test_prompt_vectors_stay_trainable(load: Load) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(load("llama"), config)
    model.word_embeddings.weight.requires_grad_(True)
    prepare(model)
    assert trainable(model) == {"prompt_encoder.default.embedding.weight"}


class OldModel(nn.Module):
    """What transformers 4 offers: the old method name, one handle, and blocks called through a function."""

    supports_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.calls: list[dict[str, Any]] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.calls.append(dict(gradient_checkpointing_kwargs or {}))

    def enable_input_require_grads(self) -> None:
        def make_inputs_require_grads(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.requires_grad_(True)

        self._require_grads_hook = self.embedding.register_forward_hook(make_inputs_require_grads)

    def disable_input_require_grads(self) -> None:
        self._require_grads_hook.remove()

    def _set_gradient_checkpointing(self, module: nn.Module, value: bool = False) -> None:
        raise AssertionError


def test_works_with_transformers_4_and_remote_code_of_the_old_format() -> None:
    model = prepare(prepare(OldModel()))
    assert model.calls == [{"use_reentrant": False}] * 2
    assert input_hooks(model) == {"embedding": ["output_requires_grad"]}
    model.disable_input_require_grads()
    assert input_hooks(model) == {}


def test_hooks_the_container_where_blocks_checkpoint_their_call() -> None:
    def call(self: nn.Module, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(nn.Module.__call__, self, *args, use_reentrant=True)

    base = type("GradientCheckpointingLayer", (nn.Module,), {"gradient_checkpointing": True, "__call__": call})
    block_class = type("Block", (base,), {"forward": lambda self, hidden_states: self.fc(hidden_states)})

    class Tower(OldModel):
        def __init__(self) -> None:
            super().__init__()
            block = block_class()
            block.fc = nn.Linear(4, 4)
            self.gradient_checkpointing = True
            self.layers = nn.ModuleList([block])

        def forward(self, input_features: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.layers[0](input_features)
            return hidden

    model = lora.attach(prepare(prepare(Tower())))
    assert input_hooks(model) == {"": ["tower_input_requires_grad"], "embedding": ["output_requires_grad"]}
    for arguments in ({"input_features": torch.ones(1, 4)}, {}):
        positional = () if arguments else (torch.ones(1, 4),)
        model.zero_grad()
        model(*positional, **arguments).sum().backward()
        assert lora.layers(model)["layers.0.fc"].lora_B.weight.grad.abs().max() > 0
    model.disable_input_require_grads()
    assert input_hooks(model) == {}


def test_hooks_a_flagged_container_of_blocks_of_no_known_class() -> None:
    class Remote(OldModel):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 4))
            self.encoder.gradient_checkpointing = False  # type: ignore[assignment]

    hooks = input_hooks(prepare(Remote()))
    assert hooks == {"embedding": ["output_requires_grad"], "encoder": ["tower_input_requires_grad"]}


def test_refuses_a_model_none_of_whose_modules_carries_the_flag() -> None:
    class Flagless(OldModel):
        _set_gradient_checkpointing = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match="Flagless"):
        prepare(Flagless())


def test_embeddings_that_are_no_module_are_passed_over() -> None:
    class Nameless(OldModel):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    class Empty(OldModel):
        def get_input_embeddings(self) -> Any:
            return None

    assert input_hooks(prepare(Nameless())) == {}
    assert input_hooks(prepare(Empty())) == {}


def test_returns_an_accelerators_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cuda"))
    return_cache("cuda")
    return_cache("no_such_device")
    assert calls == ["cuda"]
