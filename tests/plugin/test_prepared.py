"""``assert_prepared`` on models that live in this process: what it finds, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from kbitcheck_reference import lora, prepare_model_for_kbit_training

import kbitcheck
from kbitcheck import testing
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.report import Report
from kbitcheck.core.result import Status
from kbitcheck.observe import prepared
from kbitcheck.observe.in_place import left_as_it_was
from kbitcheck.observe.probes import switches
from kbitcheck.observe.twin import twins
from tests.few_steps import EACH_HALF, of_few_steps
from tests.plugin.traces import everything
from tests.shallow import shallow

# The rules whose facts a prepared model still shows, by itself or in its own steps.
JUDGED = {
    "KB101", "KB102", "KB103", "KB104", "KB105", "KB201", "KB202", "KB211", "KB215", "KB301", "KB302", "KB303", "KB304", "KB305",
    "KB306", "KB307", "KB309", "KB310", "KB311", "KB401", "KB402", "KB403", "KB405", "KB406", "KB407", "KB408", "KB410", "KB901",
    "KB802", "KB903", "KB904", "KB905", "KB907", "KB908", "KB910", "KB912", "KB913",
}  # fmt: skip
# Of an implementation, of routers under checkpointing, of a skip list.
OTHERWISE = {"KB213", "KB312", "KB514", "KB515", "KB909"}
STATIC = ("KB101", "KB102", "KB2")


@pytest.fixture(scope="module", params=["nf4,double", "int8"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return shallow("tiny:llama").load(Quantization.parse(request.param), "cpu")


@pytest.fixture
def model(loaded: Any) -> Any:
    """Prepared by the reference, without adapters."""
    return prepare_model_for_kbit_training(copy.deepcopy(loaded), True, {"use_reentrant": True})


def trained(model: Any) -> tuple[Any, Any]:
    """The model with PEFT's adapters in the middle of training: after a step, with gradients, and its optimizer."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(32).reshape(2, 16)
    wrapped.train()
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return wrapped, optimizer


@EACH_HALF
def test_it_leaves_no_trace_in_the_middle_of_training(model: Any, codes: tuple[str, ...]) -> None:
    """And judges there whatever a model still shows."""
    wrapped, optimizer = trained(model)
    before = everything(wrapped, optimizer.state_dict())
    report = testing.assert_prepared(wrapped, select=codes)
    after = everything(wrapped, optimizer.state_dict())
    assert {key: before[key] == after[key] for key in before} == dict.fromkeys(before, True)
    found = {result.rule: result for result in report}
    judged = {code for code, result in found.items() if result.status is Status.PASS}
    assert judged == (JUDGED - {"KB402"}) & {*codes}
    of_training = {code for code in codes if code.startswith("KB7") or code == "KB313"}
    gone = {code for code, result in found.items() if result.reason == prepared.GONE}
    assert gone == {*codes} - JUDGED - of_training - OTHERWISE
    assert {found[code].status for code in (*of_training, *gone, *(OTHERWISE & {*codes}))} == {Status.SKIP}


def test_a_trace_would_be_seen(model: Any) -> None:
    for disturb in (
        lambda m: torch.rand(1),
        lambda m: random.random(),
        lambda m: m.eval() if m.training else m.train(),
        lambda m: m.register_forward_hook(print),
        lambda m: setattr(m.model.norm.weight, "grad", torch.zeros_like(m.model.norm.weight)),
        lambda m: m.model.layers[0].mlp.up_proj.weight.data.view(torch.uint8).view(-1)[:1].add_(1),
    ):
        before = everything(model)
        disturb(model)
        assert everything(model) != before


def test_before_adapters_are_attached(model: Any) -> None:
    before = everything(model)
    report = kbitcheck.assert_prepared(model, select=["KB1", "KB302", "KB4"])
    assert everything(model) == before
    assert {r.rule for r in report if r.status is Status.FAIL} == set()
    assert next(r for r in report if r.rule == "KB403").status is Status.PASS


def broken(model: Any, **options: Any) -> tuple[set[str], str]:
    with pytest.raises(AssertionError) as raised:
        kbitcheck.assert_prepared(model, **options)
    assert isinstance(raised.value, kbitcheck.NonConformance)
    report: Report = raised.value.report
    return {r.rule for r in report if report.counts(r)}, str(raised.value)


def unfrozen(model: Any) -> None:
    model.model.embed_tokens.weight.requires_grad_(True)


def half_norm(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data.bfloat16()


def half_head(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.half()


@pytest.mark.parametrize(
    ("fault", "profile", "codes"),
    [
        (unfrozen, "auto", {"KB101", "KB102"}),
        (half_norm, "auto", {"KB215"}),
        (half_norm, "peft", {"KB201", "KB215"}),
        (half_head, "peft", {"KB202"}),
    ],
)
def test_what_is_wrong_is_named_as_in_a_report(
    model: Any, fault: Callable[[Any], None], profile: Any, codes: set[str]
) -> None:
    lora.attach(model, rank=2, alpha=4.0)
    fault(model)
    found, told = broken(model, profile=profile, select=STATIC)
    assert found == codes
    assert "expected" in told
    assert "Do: " in told
    assert "attributed to your code" in told


def as_trl_prepares(loaded: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """PEFT's adapters on the bare base, cast, and the forward replaced by a closure over the model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(loaded), peft.LoraConfig(r=4, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    inner = model.base_model.model
    original = inner.forward
    inner.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return model.train()


def test_a_trainers_recipe_conforms_and_is_named(loaded: Any) -> None:
    model = as_trl_prepares(loaded)
    before = everything(model)
    report = kbitcheck.assert_prepared(model, select=of_few_steps())
    assert everything(model) == before
    assert "dtypes as TRL prepares them: nothing upcast, adapters bf16 ·" in str(report).replace("\n", " ")
    judged = {r.rule for r in report if r.status is Status.PASS}
    assert judged >= {"KB103", "KB104", "KB302", "KB303", "KB304", "KB309", "KB904"}
    assert broken(model, profile="peft", select=STATIC)[0] == {"KB201", "KB202"}


def test_adapters_in_bfloat16_beside_a_base_in_float32_conform(loaded: Any) -> None:
    """As ``trl sft`` has it, which loads in float32. DoRA's magnitudes stay in float32."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(loaded)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True)).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = parameter.data.bfloat16()
    report = kbitcheck.assert_prepared(model, select=STATIC)
    assert "dtypes as TRL prepares them: everything upcast, adapters bf16 ·" in str(report).replace("\n", " ")
    assert broken(model, profile="peft", select=STATIC)[0] == {"KB202"}
    next(p for n, p in model.named_parameters() if "lora_A" in n).data = torch.zeros(4, 36)
    assert broken(model, select=STATIC)[0] == {"KB215"}


def test_the_wrapper_of_mixed_precision_is_read_off(loaded: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = as_trl_prepares(loaded, torch.float32)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test's trainer has set it
    try:
        accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    text = " ".join(str(kbitcheck.assert_prepared(model, select=["KB2"])).split())
    trainers = "LLaMA-Factory, axolotl or ms-swift"
    assert f"dtypes as {trainers} prepares them: nothing upcast, adapters fp32, autocast" in text


def test_adapters_in_several_dtypes_are_no_recipe(loaded: Any) -> None:
    model = as_trl_prepares(loaded)
    odd = next(p for p in model.parameters() if p.requires_grad)
    odd.data = odd.data.float()
    assert broken(model, select=of_few_steps())[0] == {"KB215"}


def test_a_model_nobody_prepared(loaded: Any) -> None:
    assert "KB101" in broken(copy.deepcopy(loaded), select=STATIC)[0]


def test_checkpointing_that_was_asked_for_and_is_off(loaded: Any) -> None:
    model = prepare_model_for_kbit_training(copy.deepcopy(loaded), False)
    assert "KB401" in broken(model, checkpointing="reentrant", select=["KB401"])[0]
    assert switches.mode_of(model) == "off"


def test_checkpointing_that_is_on_and_was_not_asked_for(model: Any) -> None:
    assert switches.mode_of(model) == "reentrant"
    assert broken(model, checkpointing="off", select=["KB402"])[0] == {"KB402"}


def test_a_gradient_on_the_base(model: Any) -> None:
    model.model.norm.weight.grad = torch.zeros_like(model.model.norm.weight)
    found, told = broken(model, select=["KB103"])
    assert (found, "model.norm.weight" in told) == ({"KB103"}, True)


def test_a_cut_gradient_is_caught_in_a_step(model: Any) -> None:
    def cut(module: Any, args: Any, output: Any) -> Any:
        return output.detach()

    model.model.layers[0].self_attn.o_proj.register_forward_hook(cut)
    assert "KB303" in broken(model, select=["KB303"])[0]


@pytest.mark.transformers5("it always passes use_reentrant")
def test_strict_counts_a_should_and_ignore_leaves_it_out(loaded: Any) -> None:
    model = prepare_model_for_kbit_training(copy.deepcopy(loaded), True, {"use_reentrant": True})
    model.activation_checkpointing_enable({})
    assert switches.mode_of(model) == "default"
    kbitcheck.assert_prepared(model, select=["KB407"])
    assert broken(model, select=["KB407"], strict=True)[0] == {"KB407"}


def test_no_step_runs_where_none_is_allowed(model: Any) -> None:
    model.forward = Mock(side_effect=AssertionError)
    report = kbitcheck.assert_prepared(model, allow_step=False)
    results = {r.rule: r for r in report}
    assert results["KB101"].status is Status.PASS
    assert (results["KB304"].status, "allow_step=False" in results["KB304"].reason) == (Status.SKIP, True)
    told = " ".join(str(report).split())
    assert "✓ nothing wrong in what could be looked at (dtypes, flags): " in told
    assert "gradients were not judged: no step was allowed" in told
    with pytest.raises(kbitcheck.NonConformance) as raised:
        kbitcheck.assert_prepared(model, allow_step=False, strict=True)
    assert raised.value.report.exit_code == 5


def scaled(module: Any) -> None:
    """An attention whose forward was replaced, and is off by a part in a hundred."""
    original = module.forward
    module.forward = lambda *args, **kwargs: (original(*args, **kwargs)[0] * 1.01, None)


def cut(module: Any) -> None:
    module.register_forward_hook(lambda module, args, output: (output[0].detach(), output[1]))


@pytest.mark.parametrize(("fault", "code"), [(scaled, "KB304"), (cut, "KB302")])
def test_what_was_put_over_a_block_is_no_part_of_its_twin(model: Any, fault: Callable[[Any], None], code: str) -> None:
    fault(model.model.layers[1].self_attn)
    found, text = broken(model, select=[code])
    assert (found, "layers.1" in text) == ({code}, True)


def test_a_resting_adapter_is_no_fault(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(model, config)
    wrapped.add_adapter("second", config)
    wrapped.set_adapter("default")
    kbitcheck.assert_prepared(wrapped, select=["KB101", "KB102"])


def test_a_batch_of_ones_own(model: Any) -> None:
    ids = torch.arange(24).reshape(2, 12)
    report = kbitcheck.assert_prepared(model, select=["KB403"], batch={"input_ids": ids, "labels": ids})
    assert [r.status for r in report] == [Status.PASS]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"profile": "best"}, "no such profile"),
        ({"freezes": "never"}, "no such freezes"),
        ({"checkpointing": "sometimes"}, "no such checkpointing"),
        ({"select": ["KB99"]}, "no rule matches"),
    ],
)
def test_wrong_options(model: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(kbitcheck.UsageError, match=told):
        kbitcheck.assert_prepared(model, **options)


def test_an_unquantized_model_is_wrong_usage() -> None:
    with pytest.raises(kbitcheck.UsageError, match="no quantized layer"):
        kbitcheck.assert_prepared(torch.nn.Linear(2, 2))


def test_where_everything_is_skipped_nothing_was_asserted(model: Any) -> None:
    with pytest.raises(kbitcheck.NonConformance):
        kbitcheck.assert_prepared(model, select=["KB205"])


def test_random_states_and_threads_are_put_back() -> None:
    def states() -> Any:
        return (
            torch.get_rng_state().tolist(),
            repr(numpy.random.get_state()),
            random.getstate(),
            torch.get_num_threads(),
        )

    before = states()
    with left_as_it_was(torch.nn.Identity()), prepared.undisturbed(threads=torch.get_num_threads() + 1):
        torch.rand(1), numpy.random.rand(), random.random()
        assert not any(a == b for a, b in zip(before, states(), strict=True))
    assert states() == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory is left"), RuntimeError("another dtype")])
def test_a_twin_that_does_not_run_skips_the_rules_that_need_it(
    model: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "float64", Mock(side_effect=error))
    report = kbitcheck.assert_prepared(model, select=["KB101", "KB304"])
    result = next(r for r in report if r.rule == "KB304")
    assert (result.status, str(error) in result.reason) == (Status.SKIP, True)
