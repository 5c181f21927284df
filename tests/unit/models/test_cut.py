"""A cut of a model: which blocks stay, that the weights are the model's own, and what cannot be cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models import cut as cutting
from kbitcheck.models.blocks import described, signature
from kbitcheck.models.cut import NoCut, cut
from kbitcheck.models.load import quiet
from kbitcheck.models.sources.architecture import named
from kbitcheck.observe import cut as proof
from kbitcheck.observe.cut import proven_cut
from tests.architectures import distinct
from tests.deep import deep

CUTS = [
    ("arch:llama", {"model.layers": (2, 6)}),
    ("arch:gemma3_text", {"model.layers": (4, 12)}),
    ("arch:deepseek_v3", {"model.layers": (3, 6)}),
    ("arch:mamba2", {"backbone.layers": (2, 6)}),
    ("arch:seq2seq-lm/t5", {"encoder.block": (3, 6), "decoder.block": (3, 6)}),
    ("arch:speech-seq2seq/whisper", {"model.encoder.layers": (2, 6), "model.decoder.layers": (2, 6)}),
    # The text reads the last hidden state but one of the images' tower.
    ("arch:image-text-to-text/llava", {"model.vision_tower.encoder.layers": (6, 6), "model.language_model.layers": (2, 6)}),
]  # fmt: skip


def loaded(name: str, quant: str = "nf4") -> Any:
    return deep(named(name)).load(Quantization.parse(quant))


def batch(name: str, model: Any) -> Any:
    return deep(named(name)).batch(model)


@pytest.mark.parametrize(("name", "towers"), CUTS, ids=[name for name, _ in CUTS])
def test_a_cut_holds_every_kind_of_block_twice_and_is_proven(name: str, towers: dict[str, tuple[int, int]]) -> None:
    model = loaded(name)
    with quiet():
        made = proven_cut(model, batch(name, model)).cut
    assert [(t.kept, t.total) for t in made.towers] == [*towers.values()]
    assert {t.name.replace(".vision_model.", ".") for t in made.towers} == {*towers}  # as before transformers 5
    own, short = dict(model.named_parameters()), dict(made.model.named_parameters())
    assert all(parameter is own[name] for name, parameter in short.items())
    assert len(short) < len(own)
    assert all(len(model.get_submodule(t.name)) == t.total for t in made.towers)  # the model itself is left alone


@pytest.mark.parametrize("quant", ["nf4,double", "int8"])
def test_a_cut_of_a_wrapped_model_keeps_its_adapters_and_its_quantization(quant: str) -> None:
    peft = pytest.importorskip("peft")
    model = loaded("arch:llama", quant)
    fed = batch("arch:llama", model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    made = proven_cut(wrapped, fed).cut
    (tower,) = made.towers
    assert (tower.name, tower.kept, tower.total) == ("base_model.model.model.layers", 2, 6)
    own = dict(wrapped.named_parameters())
    assert [n for n, p in made.model.named_parameters() if p is not own[n]] == []
    assert any("lora_A" in n for n, _ in made.model.named_parameters())
    assert made.model.get_base_model().config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 6


def test_a_kind_that_only_the_last_block_is_of_leaves_nothing_to_cut() -> None:
    model = loaded("arch:llama")
    model.model.layers[-1].register_forward_hook(lambda *_: None)
    with pytest.raises(NoCut, match="no tower has more blocks than a cut holds"):
        cut(model)


def test_blocks_that_run_several_times_are_not_cut() -> None:
    model = loaded("arch:llama")
    model.model.layers[5] = model.model.layers[0]
    with pytest.raises(NoCut, match=r"model\.layers runs a block several times"):
        cut(model)


def test_a_configuration_that_refuses_fewer_blocks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("arch:llama")
    monkeypatch.setattr(type(model.config), "from_dict", lambda fields: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(NoCut, match=r"the configuration of fewer blocks is refused \(ValueError: no\)"):
        cut(model)


def test_a_shape_that_depends_on_the_number_of_blocks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(loaded("arch:llama"))
    build = cls.__init__

    def with_table(self: Any, config: Any) -> None:
        build(self, config)
        self.model.register_buffer("table", torch.zeros(config.num_hidden_layers), persistent=False)

    monkeypatch.setattr(cls, "__init__", with_table)
    model = loaded("arch:llama")
    with pytest.raises(NoCut, match=r"model\.table has another shape in a model of fewer blocks"):
        cut(model)


def test_a_setting_that_depends_on_the_number_of_blocks_is_the_shorter_models(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(loaded("arch:llama"))
    build = cls.__init__

    def counting(self: Any, config: Any) -> None:
        build(self, config)
        self.kinds = ["same"] * config.num_hidden_layers

    monkeypatch.setattr(cls, "__init__", counting)
    model = loaded("arch:llama")
    assert (cut(model).model.kinds, len(model.kinds)) == (["same"] * 2, 6)


@pytest.mark.parametrize("damage", ["a weight", "what enters a block", "the logits"])
def test_what_is_no_cut_is_not_proven(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("arch:llama")
    fed = batch("arch:llama", model)

    def wrong(whole: nn.Module, **options: Any) -> Any:
        made = cutting.cut(whole, **options)
        layers = made.model.model.layers
        if damage == "a weight":
            norm = layers[0].input_layernorm
            norm.weight = nn.Parameter(norm.weight * 2)
        elif damage == "what enters a block":
            layers[0].register_forward_hook(lambda module, args, output: output * 2)
        else:
            made.model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
        return made

    monkeypatch.setattr(proof, "cut", wrong)
    where = {
        "a weight": r"model\.layers\.0\.input_layernorm\.weight is another in the cut",
        "what enters a block": r"what enters model\.layers\.1 in the cut is not the whole model's",
        "the logits": "what the model returns in the cut is not the whole model's",
    }
    with pytest.raises(NoCut, match=where[damage]):
        proven_cut(model, fed)


def test_the_description_of_a_block_tells_functions_apart_by_what_they_do() -> None:
    def times(factor: float) -> Any:
        return lambda module, args, output: output * factor

    def hooked(hook: Any) -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.register_forward_hook(hook)
        return layer

    two, again, three = hooked(times(2.0)), hooked(times(2.0)), hooked(times(3.0))
    plain = nn.Linear(2, 2)
    assert described(two) == described(again)
    assert len({str(signature(each)) for each in (two, three, plain)}) == 3
    halved = copy.deepcopy(plain)
    halved.weight.data = halved.weight.data.to(torch.bfloat16)
    assert signature(halved) != signature(plain)
    renamed = copy.deepcopy(plain)
    renamed.__class__ = type("Linear", (nn.Linear,), {"forward": lambda self, x: x})
    assert signature(renamed) != signature(plain)


# Architectures that cannot be cut, or do not run at all, by what the reason says.
NOT_CUT = {
    "has other modules": {"blt"},
    "another shape": {"gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"},
    "is not the whole model's": {"minicpm3"},  # residuals are scaled by the number of blocks
    "no numbered blocks": {"cpmant", "ctrl", "gpt_neox_japanese", "openai-gpt", "reformer", "xlm", "xlnet", "fsmt"},
    # Each block is of a kind of its own: its seed, or its initial lambda; or there are two blocks.
    "no tower has more blocks": {"beam", "big_bird", "bloom", "diffllama", "nemotron_h", "bigbird_pegasus", "gemma3n_text"},
    "does not say how many blocks": {"hrm_text"},
    "a forward raises": {"git", "longcat_flash", "mamba"},  # nor does the whole model run, quantized
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.transformers5("has these architectures")
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "speech-seq2seq"])
def test_every_architecture_that_runs_is_cut_or_has_a_reason(task: str) -> None:
    odd, number = {}, 0
    for kind in distinct(task):
        name = f"arch:{task}/{kind}"
        try:
            with quiet():
                model = loaded(name)
                fed = batch(name, model)
        except UsageError:  # the deep configuration is refused
            continue
        number += 1
        try:
            with quiet():
                proven_cut(model, fed)
        except NoCut as error:
            if not any(reason in str(error) and kind in expected for reason, expected in NOT_CUT.items()):
                odd[kind] = str(error)
    assert odd == {}
    assert number > 5
