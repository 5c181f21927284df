"""Adapters of configurations: what trains rightly is not flagged, and one fault in one adapter is caught."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training
from torch import nn

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable, UsageError
from kbitcheck.core.result import Party, Result, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.models.blocks import is_block
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes.adapters import Attached
from kbitcheck.observe.twin import twins
from tests.shallow import shallow

EXPERTS = {"peft_type": "LORA", "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ALL_LINEAR = {"peft_type": "LORA", "target_modules": "all-linear"}
BIASES = {"peft_type": "LORA", "bias": "all"}


@functools.cache
def loaded(model: str, quant: str) -> Loaded:
    return Loaded.from_source(shallow(model), CaseSpec(model=model, quant=quant, implementation="reference"))


def judged(
    adapters: Mapping[str, Any] | str,
    *codes: str,
    model: str = "tiny:llama",
    quant: str = "nf4",
    prepare: Callable[..., Any] = prepare_model_for_kbit_training,
) -> dict[str, Result]:
    text = adapters if isinstance(adapters, str) else json.dumps(adapters)
    spec = CaseSpec(
        model=model, quant=quant, implementation="reference", checkpointing="reentrant", adapters=text, cut="never"
    )
    with torch.compiler.set_stance("force_eager"):
        case = Case(spec, prepare, loaded(model, quant))
        try:
            return {code: judge(rules()[code], case) for code in codes}
        finally:
            case.close()


def broken(damage: Callable[[Any], None]) -> Callable[..., Any]:
    """A preparation that does this to the model before each forward of its first block."""

    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        block = next(m for m in model.modules() if is_block(m))
        block.register_forward_pre_hook(lambda *_: damage(model))
        return model

    return prepare


@pytest.mark.parametrize(
    ("adapters", "model"), [("peft:DoRA", "tiny:llama"), (BIASES, "tiny:gpt2"), (EXPERTS, "tiny:mixtral")]
)
def test_adapters_of_a_configuration_are_no_false_alarm(adapters: Any, model: str) -> None:
    results = judged(adapters, "KB102", "KB302", "KB304", "KB305", "KB803", model=model)
    assert {code: (r.status, r.failures[:1], r.reason) for code, r in results.items()} == dict.fromkeys(
        results, (Status.PASS, (), "")
    )


@pytest.mark.parametrize(
    ("adapters", "model"),
    [
        ("peft:LoRA", "tiny:gpt-oss"),
        # PEFT puts one on the router, too.
        pytest.param(ALL_LINEAR, "tiny:mixtral", marks=pytest.mark.transformers5("stacks its experts")),
    ],
)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_stacks_of_experts_get_no_adapter_of_a_configuration_that_names_none(adapters: Any, model: str) -> None:
    results = judged(adapters, "KB302", "KB304", "KB803", model=model, quant="nf4,experts=parametrize")
    assert {code: (r.status, r.reason) for code, r in results.items()} == dict.fromkeys(results, (Status.PASS, ""))


def test_a_parameter_that_is_a_constant_is_no_adapter() -> None:
    results = judged("peft:AdaLoRA", "KB102", "KB302", "KB304", quant="int8")
    assert {code: (r.status, r.reason) for code, r in results.items()} == dict.fromkeys(results, (Status.PASS, ""))


def test_one_magnitude_that_does_not_train_is_caught() -> None:
    def freeze(model: Any) -> None:
        magnitudes = [p for n, p in model.named_parameters() if "magnitude" in n]  # none before adapters are on
        for magnitude in magnitudes[:1]:
            magnitude.requires_grad_(False)

    result = judged("peft:DoRA", "KB302", prepare=broken(freeze))["KB302"]
    assert result.status is Status.FAIL
    assert len(result.failures) == 1
    assert "magnitude" in result.failures[0].where


def test_a_bias_that_two_layers_share_is_caught() -> None:
    def share(model: Any, *arguments: Any) -> Any:
        prepare_model_for_kbit_training(model, *arguments)
        first, second, *_ = (m for m in model.modules() if is_block(m))
        first.ln_1.bias = second.ln_1.bias
        return model

    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        return share(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)

    results = judged(BIASES, "KB302", "KB304", model="tiny:gpt2", prepare=prepare)
    assert Status.FAIL in {r.status for r in results.values()}, results


def test_a_delta_that_one_expert_does_not_get_is_caught() -> None:
    def drop(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "experts" in name and "lora_A" in name:
                parameter.data[:4] = 0

    result = judged(EXPERTS, "KB304", model="tiny:mixtral", prepare=broken(drop))["KB304"]
    assert result.status is Status.FAIL
    assert any("experts" in failure.where for failure in result.failures)


def test_a_start_that_quantizes_the_base_anew_is_caught_and_is_the_stacks() -> None:
    result = judged("peft:OLoRA", "KB803")["KB803"]
    assert (result.status, result.attributed_to) == (Status.FAIL, Party.STACK)


def test_adapters_that_read_the_codes_of_int8_weights_are_not_the_implementations_fault() -> None:
    result = judged("peft:HRA", "KB304", quant="int8")["KB304"]
    assert (result.status, {failure.party for failure in result.failures}) == (Status.FAIL, {Party.MODEL})


def test_a_start_that_peft_refuses_is_no_failure() -> None:
    result = judged("peft:PiSSA", "KB803")["KB803"]
    assert result.status is Status.SKIP
    assert "PiSSA" in result.reason


def test_adapters_that_only_an_unprepared_base_does_not_run_are_judged() -> None:
    """PEFT's IA3 returns float32 of int8 layers, which the next norm of a half-precision base does not take."""
    assert judged("peft:IA3", "KB302", quant="int8")["KB302"].status is Status.PASS


def test_adapters_that_peft_does_not_run_on_this_base_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="peft does not run these adapters on this model: RuntimeError"):
        judged("peft:LoHa", "KB302")


def test_a_twin_that_fails_with_some_adapters_is_tried_once_and_stops_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CaseSpec(model="tiny:llama", quant="nf4", implementation="reference")
    tried: list[str] = []

    def attach(model: nn.Module, spec: CaseSpec) -> Attached:
        tried.append(spec.adapters)
        if spec.adapters == "peft":
            raise RuntimeError("not in float64")
        return adapter_probe.attach(model, targets, library="reference", rank=4, seed=0)

    first = loaded("tiny:llama", "nf4")
    targets = first.targets
    base = Loaded(first.copy(), first.source, case, attach=attach)
    for _ in range(2):
        with pytest.raises(Unavailable, match="does not run: RuntimeError: not in float64"):
            base.twins(dataclasses.replace(case, adapters="peft"))
    assert tried == ["peft"]
    assert base.twins(case).whole.exact.keys() == base.twins(case).whole.rounded.keys() != set()

    def fail(*arguments: Any) -> nn.Module:
        raise RuntimeError("no float64 at all")

    base = Loaded(first.copy(), first.source, case, attach=attach)
    tried.clear()
    with monkeypatch.context() as patch:
        patch.setattr(twins, "float64", fail)
        with pytest.raises(Unavailable, match="no float64 at all"):
            base.function("peft")
    with pytest.raises(Unavailable, match="no float64 at all"):
        base.twins(case)
    assert tried == []
