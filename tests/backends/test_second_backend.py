"""The seam holds: a backend that kbitcheck has never heard of is loaded, judged, forecast and sabotaged like its own."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training as reference
from torch import nn

import kbitcheck
from kbitcheck import backends
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization, usage
from kbitcheck.core.cases import Checkpointing
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe import loaded
from tests.backends.rowwise import BACKEND, FORMAT, RowwiseLinear
from tests.few_steps import of_few_steps
from tests.shallow import shallow

# What may hang on the mode; of the other rules one mode is enough.
OF_STEPS = tuple(code for code in of_few_steps() if code.startswith(("KB1", "KB2", "KB3", "KB4")))
MODES: list[tuple[str, list[Checkpointing], tuple[str, ...]]] = [
    ("tiny:llama", ["reentrant", "non-reentrant", "off"], OF_STEPS),
    ("tiny:gpt2", ["reentrant"], ()),  # with biases, and weights the other way round, which no mode asks after
]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loaded, "source_of", lambda spec: shallow(spec.model))
    with registry.added(BACKEND, FORMAT):
        yield


def failing(prepare: Any, codes: list[str], model: str = "tiny:llama", mode: Checkpointing = "reentrant") -> set[str]:
    report = kbitcheck.check_implementation(
        prepare, models=[model], quants=["rowwise-int8"], checkpointing=[mode], select=codes
    )
    return {result.rule for result in report.results if result.status.value in ("FAIL", "ERROR")}


@pytest.mark.parametrize(("model", "modes", "codes"), MODES, ids=[model for model, *_ in MODES])
def test_the_reference_conforms(model: str, modes: list[Checkpointing], codes: tuple[str, ...]) -> None:
    report = kbitcheck.check_implementation(
        reference, models=[model], quants=["rowwise-int8"], checkpointing=modes, strict=True, select=codes
    )
    broken = {
        (r.rule, r.case): r.reason or r.failures[0]
        for r in report.results
        if report.counts(r) or r.status.value == "ERROR"
    }
    assert broken == {}
    assert report.exit_code == 0


@pytest.mark.parametrize(("quant", "broken"), [("rowwise-int8", set()), ("nf4", {"KB510"})])
def test_a_base_of_which_its_configuration_says_nothing_need_not_come_back(
    quant: str, broken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers knows the method, that the base is not loaded again is the stack's fault, and told."""

    def reload(self: loaded.Loaded, folder: str, device: str) -> Any:
        raise RuntimeError("missing keys")

    monkeypatch.setattr(loaded.Loaded, "reload", reload)
    report = kbitcheck.check_implementation(
        reference, models=["tiny:llama"], quants=[quant], checkpointing=["off"], select=["KB510"]
    )
    (result,) = report.results
    assert {result.rule for _ in result.failures} == broken


def test_the_static_audit_is_right_to_the_byte() -> None:
    source, quant = resolve("tiny:llama"), Quantization.parse("rowwise-int8")
    real, empty = source.load(quant), source.meta(quant)

    def sizes(model: Any) -> dict[str, int]:
        state = {
            f"{n}:{k}": v.nbytes
            for n, m in backends.quantized_layers(model)
            for k, v in backends.recognition(m).state(m).items()
        }
        return {**{n: p.nbytes for n, p in model.named_parameters()}, **state}

    assert any(isinstance(m, RowwiseLinear) for m in real.modules())
    assert sizes(empty) == sizes(real)
    assert all(p.is_meta for p in empty.parameters())


def damaged(damage: Any) -> Any:
    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        damage([module for _, module in backends.quantized_layers(model)])
        return model

    return prepare


@pytest.mark.parametrize(("part", "code"), [("code", "KB205"), ("scale", "KB206")])
def test_a_corrupted_weight_is_caught(part: str, code: str) -> None:
    assert code in failing(damaged(lambda layers: backends.recognition(layers[1]).corrupt(layers[1], part)), [code])


def test_a_cut_layer_is_caught() -> None:
    def cut(layers: list[nn.Module]) -> None:
        layers[1].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))

    assert failing(damaged(cut), ["KB303"]) == {"KB303"}


@pytest.mark.parametrize(
    ("widened", "broken"), [((), set()), (("layers.0.input_layernorm",), {"KB215"})], ids=["none", "one-of-many"]
)
def test_no_upcast_is_promised_around_it_but_one_recipe_is(widened: tuple[str, ...], broken: set[str]) -> None:
    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        model.requires_grad_(False)
        for name in widened:
            model.model.get_submodule(name).float()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": True})
        model.enable_input_require_grads()
        return model

    assert failing(prepare, ["KB201", "KB202", "KB209", "KB215", "KB304"]) == broken


def test_help_and_errors_name_its_scheme() -> None:
    assert "rowwise-int8, then skip=MODULE" in usage()
    assert BACKEND in registry.registered()
    with pytest.raises(kbitcheck.UsageError, match="rowwise-int8 takes only skip=MODULE, not double"):
        Quantization.parse("rowwise-int8,double")


def test_two_backends_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two backends are called"), registry.added(BACKEND):
        pass


def test_plain_numbers_are_no_packed_weight() -> None:
    assert backends.of(nn.Linear(2, 2)) is None
    assert not backends.is_packed(nn.Parameter(torch.zeros(2)))


def test_what_the_guide_has_an_author_write_proves_that_faults_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "writing-a-backend.md").read_text(encoding="utf-8")
    (example,) = (each for each in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "def test_" in each)
    monkeypatch.setitem(sys.modules, "rowwise_kbitcheck", SimpleNamespace(BACKEND=BACKEND))
    names: dict[str, Any] = {}
    exec(textwrap.dedent(example), names)
    names["test_a_broken_weight_is_caught"]()
    names["damaged"] = lambda part: reference
    with pytest.raises(AssertionError):
        names["test_a_broken_weight_is_caught"]()
