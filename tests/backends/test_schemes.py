"""Every scheme by which models are quantized here, but bitsandbytes' own: the reference conforms, faults are caught."""

from __future__ import annotations

from typing import Any

import pytest
from kbitcheck_reference import prepare_model_for_kbit_training as reference
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.observe import loaded
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.run.suites import fits
from tests.few_steps import of_few_steps
from tests.shallow import shallow

SCHEMES = (
    "torchao-int8", "fp8,block=32", "quanto-int8", "quanto-int4", "compressed-tensors-int4", "compressed-tensors-int8",
    "hqq-int4", "gptq-int4", "awq-int4", "aqlm",
)  # fmt: skip
# Those that are packed while they run.
PACKED = [text for text in SCHEMES if not registry.of_scheme(text.partition(",")[0]).unpacked_by]


def scheme(text: str) -> Any:
    backend = registry.of_scheme(text.partition(",")[0])
    why = backend.unavailable() or backend.not_on_load()
    return pytest.param(text, marks=pytest.mark.skipif(bool(why), reason=why or "runs here"))


each_scheme = pytest.mark.parametrize("quant", [scheme(text) for text in SCHEMES])


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "source_of", lambda spec: shallow(spec.model))


def model_of(quant: str) -> str:
    """A recipe all of whose layers can be packed so."""
    return "tiny:llama" if fits("tiny:llama", quant) else "tiny:opt"


def report(prepare: Any, quant: str, codes: Any, mode: Any = "reentrant") -> Any:
    return kbitcheck.check_implementation(
        prepare, models=[model_of(quant)], quants=[quant], checkpointing=[mode], strict=True, select=codes
    )


def failing(prepare: Any, quant: str, codes: Any) -> set[str]:
    return {r.rule for r in report(prepare, quant, codes).results if r.status.value == "FAIL"}


def damaged(damage: Any) -> Any:
    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        damage([layer for _, layer in backends.quantized_layers(model)])
        return model

    return prepare


def test_no_scheme_is_left_out() -> None:
    own = {s.name for s in registry.of_scheme("nf4").schemes}
    assert set(registry.run_here()) - own <= {text.partition(",")[0] for text in SCHEMES}


@each_scheme
@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "off"])
def test_the_reference_conforms(quant: str, mode: str) -> None:
    judged = report(reference, quant, of_few_steps(), mode)
    broken = {
        (r.rule, r.reason or r.failures[:1]) for r in judged.results if judged.counts(r) or r.status.value == "ERROR"
    }
    assert broken == set()
    assert {"KB205", "KB206", "KB207", "KB303"} <= {r.rule for r in judged.results if r.status.value == "PASS"}


@each_scheme
@pytest.mark.parametrize(("part", "code"), [("code", "KB205"), ("scale", "KB206")])
def test_a_corrupted_weight_is_caught(quant: str, part: str, code: str) -> None:
    damage = damaged(lambda layers: backends.recognition(layers[1]).corrupt(layers[1], part))
    assert failing(damage, quant, [code]) == {code}


@each_scheme
def test_a_cut_layer_is_caught(quant: str) -> None:
    def cut(layers: list[nn.Module]) -> None:
        layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))

    assert failing(damaged(cut), quant, ["KB303"]) == {"KB303"}


@each_scheme
def test_a_gradient_that_is_off_by_two_per_cent_is_caught(quant: str) -> None:
    def scale(layers: list[nn.Module]) -> None:
        def longer(module: Any, entered: Any, left: Any) -> Any:
            return (1.02 * entered[0],)

        layers[1].register_full_backward_hook(longer)

    assert failing(damaged(scale), quant, ["KB303"]) == {"KB303"}


@pytest.mark.parametrize("quant", [scheme(text) for text in PACKED])
def test_a_weight_that_is_unpacked_without_a_word_is_caught(quant: str) -> None:
    def unpack(layers: list[Any]) -> None:
        weight = backends.arithmetic(layers[0]).unpacked(layers[0])
        packed = backends.recognition(layers[0]).packed(layers[0])
        own = (*layers[0].named_parameters(recurse=False), *layers[0].named_buffers(recurse=False))
        (name,) = (name for name, tensor in own if tensor is packed)
        setattr(layers[0], name, nn.Parameter(weight.detach().clone(), requires_grad=False))

    assert "KB207" in failing(damaged(unpack), quant, ["KB205", "KB207"])


@each_scheme
def test_sizes_without_weights_are_right_to_the_byte(quant: str) -> None:
    how = Quantization.parse(quant)
    real, empty = (snapshot(getattr(shallow(model_of(quant)), way)(how)) for way in ("load", "meta"))
    assert {n: t.nbytes for n, t in empty.parameters.items()} == {n: t.nbytes for n, t in real.parameters.items()}
    assert {n: layer.scheme for n, layer in empty.layers.items()} == {
        n: layer.scheme for n, layer in real.layers.items()
    }
    assert real.layers
