"""What is judged without weights, and when."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from kbitcheck_reference import prepare_model_for_kbit_training

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.core.facts import Passes
from kbitcheck.core.memory_sizes import GPUS
from kbitcheck.core.plan import MARGIN
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, rules, select
from kbitcheck.observe import open_case as opening
from kbitcheck.observe import planning
from kbitcheck.observe.case import Case
from kbitcheck.observe.device import free_bytes
from kbitcheck.observe.forecast.attention import AMPERE
from kbitcheck.observe.forecast.fitting import on_gpu_of
from kbitcheck.observe.forecast.predict import default_mode, runtime_of
from kbitcheck.observe.open_case import open_case, plans_of
from kbitcheck.observe.static import NEEDS_A_RUN, StaticCase
from kbitcheck.run.subject import describe

CONFIGS = Path(__file__).parents[2] / "fixtures" / "configs"
REFERENCE = describe(prepare_model_for_kbit_training)
JUDGED = {"KB901", "KB902", "KB903", "KB905", "KB906", "KB907", "KB908", "KB910", "KB912", "KB913"}


def opened(model, *, static="always", quant="nf4", rules=(), seconds=math.inf, **options):
    spec = CaseSpec(model=str(model), quant=quant, implementation="given", static=static, **options)
    return open_case(spec, REFERENCE, rules=rules, seconds=seconds)


@pytest.fixture(scope="module")
def mixtral():
    return opened(CONFIGS / "mixtral-8x7b.json", memory=24 << 30, seq_len=64, device="auto")


shares_a_forecast = pytest.mark.xdist_group("mixtral")


@shares_a_forecast
@pytest.mark.transformers5("Mixtral's experts, and Falcon's layers, are quantized")
def test_only_what_needs_no_run_is_judged(mixtral):
    results = {rule.code: judge(rule, mixtral) for rule in select()}
    assert {c for c, r in results.items() if r.status in (Status.PASS, Status.FAIL)} == JUDGED
    assert [r for r in results.values() if r.status is Status.ERROR] == []
    assert results["KB101"].reason == results["KB904"].reason == NEEDS_A_RUN
    assert {c for c, r in results.items() if r.status is Status.FAIL} == {"KB901", "KB902", "KB906"}
    named = [f.where for f in results["KB901"].failures]
    assert "model.layers.0.mlp.experts.gate_up_proj" in named
    assert "2.9%" in results["KB901"].failures[-1].actual
    assert f"experts +{2 * 32 * 8 * 3 * 4096 * 14336:,}" in results["KB902"].failures[0].actual


@shares_a_forecast
def test_the_forecast_adds_up(mixtral):
    told = mixtral.forecast
    assert told.device == "cuda"  # not asked for a device: where such a model is trained
    assert set(told.activations) == {"off", "non-reentrant"}
    step = told.activations["non-reentrant"]
    assert told.total("non-reentrant") == (
        told.loaded + told.upcast + told.adapters + 2 * told.adapters + max(step.peak, told.adapters)
    )
    assert told.autocast == "bf16"
    assert set(told.attention) == {"bf16", "none"}
    assert told.attention["bf16"] == {"flash": 32}
    assert told.logits == 4 * told.batch * told.seq_len * 32_000  # of that step, in float32
    assert told.memory == 24 << 30
    assert told.largest_batch[24 << 30] == told.longest[24 << 30] == 0
    assert set(told.rooms) == {24 << 30}  # no other memory was asked for
    assert json.loads(json.dumps(mixtral.summary()))["forecast"]["parameters"] == 46_702_792_704


@pytest.mark.transformers5("Mixtral's experts, and Falcon's layers, are quantized")
def test_a_model_of_which_nothing_is_quantized_is_told_of(tmp_path):
    # Falcon's layers are a class of their own, which transformers does not replace.
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 320}
    config = {"model_type": "falcon", "architectures": ["FalconForCausalLM"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    case = opened(tmp_path, memory=1000)
    results = {rule.code: judge(rule, case) for rule in select()}
    assert {c for c, r in results.items() if r.status is Status.FAIL} == {"KB901", "KB902", "KB906", "KB912"}
    assert not [c for c, r in results.items() if r.status is Status.ERROR]
    assert "no step: no layer is quantized" in results["KB906"].failures[0].actual


def test_steps_are_no_longer_than_the_model_allows(tmp_path):
    sizes = {"max_position_embeddings": 64, "num_hidden_layers": 2}
    told = opened(with_fields(tmp_path, **sizes), memory=16 << 30).forecast
    assert (told.seq_len, told.longest[16 << 30], told.missing, told.usual) == (64, 64, "", {})
    assert told.largest_batch[16 << 30] > 0


def test_a_length_beyond_the_models_limit_is_told_of(tmp_path):
    told = opened(
        with_fields(tmp_path, max_position_embeddings=64, num_hidden_layers=2), memory=16 << 30, seq_len=80
    ).forecast
    assert told.notes[-1] == "80 tokens are more than the 64 that the model's configuration allows"
    assert told.longest[16 << 30] == 64


def test_a_full_audit_predicts_what_it_finds():
    case = opened("tiny:llama", static="never")
    assert isinstance(case, Case)
    result = judge(rules()["KB906"], case)
    assert (result.status, result.examined) == (Status.PASS, 1)
    assert case.forecast.activations == {}
    told = opened("tiny:llama", static="if-too-large", device="cpu", autocast="none")
    assert isinstance(told, Case)
    logits = told.forecast.logits  # the Trainer drops them before the backward, the probe does not
    assert told.forecast.activations["non-reentrant"].held + logits == told.memory.held
    assert set(told.forecast.compared) == {"bf16"}
    assert told.forecast.longest == {}  # far less than any GPU has


SLOW = planning.Machine(half=2e-3, single=2e-3, double=4e-3, copy=2e-4, digest=5e-3, operator=1e-4)


@pytest.fixture
def machine(monkeypatch):
    """A slow one with much memory."""
    monkeypatch.setattr(opening, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(planning, "machine", lambda: SLOW)


def large(**options):
    return CaseSpec(
        model=str(CONFIGS / "smollm-135m.json"), quant="nf4", implementation="peft", random_weights=True, **options
    )


def test_what_this_machine_has_no_room_for_is_static(monkeypatch):
    monkeypatch.setattr(opening, "free_bytes", lambda device: 500_000)
    case = opened("tiny:llama", static="if-too-large", rules=select())
    assert isinstance(case, StaticCase)
    assert "GB of memory are free" in case.why
    assert case.forecast.device == "cpu"


def test_what_there_is_no_time_to_load_is_static(machine):
    case = open_case(large(static="if-too-large"), REFERENCE, rules=select(), seconds=3.0)
    assert isinstance(case, StaticCase)
    assert "to load and prepare the model takes about" in case.summary()["static"]


def test_what_does_not_fit_the_time_is_left_out_by_name(machine):
    (whole,) = plans_of([large()], select())
    assert not any(item.left_out for item in whole.items)
    (plan,) = plans_of([large()], select(), seconds=whole.seconds)  # a prediction may be too low
    left = [item.left_out for item in plan.items if item.left_out]
    named = [re.fullmatch(r"not judged: needs `(\w+)`, about \d+ s; --timeout \d+0 allows it", why) for why in left]
    assert {match[1] for match in named if match} & {item.fact for item in plan.items if item.left_out}
    assert left
    assert all(named)
    facts = plan.seconds - plan.opening
    assert plan.opening + facts * MARGIN <= whole.seconds < sum(item.seconds for item in plan.items) * MARGIN
    suggested = max(float(why.split("--timeout ")[1].split()[0]) for why in left)
    (again,) = plans_of([large()], select(), seconds=suggested)
    assert not any(item.left_out for item in again.items)


@pytest.mark.parametrize("static", ["always", "if-too-large"])
def test_a_forecast_that_there_is_no_time_for_is_left_out(machine, static):
    rule = rules()["KB906"]
    case = opened("tiny:llama", static=static, rules=[rule], memory=16 << 30, seconds=0.01)
    result = judge(rule, case)
    assert result.status is Status.SKIP
    assert re.fullmatch(r"not judged: needs `forecast`, about \d+ s; --timeout \d+0 allows it", result.reason)
    assert set(case.summary()["left_out"]) == {"forecast"}
    assert judge(rule, opened("tiny:llama", static=static, rules=[rule], seconds=60)).status is Status.PASS


def test_an_audit_that_has_no_time_for_all_judges_the_rest(machine):
    selected = [rules()[code] for code in ("KB101", "KB308", "KB501")]
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="reference", static="if-too-large")
    (plan,) = plans_of([spec], selected)
    case = open_case(spec, REFERENCE, rules=selected, seconds=plan.seconds)
    results = {rule.code: judge(rule, case) for rule in selected}
    assert {code: r.status for code, r in results.items()} == {
        "KB101": Status.PASS,
        "KB308": Status.SKIP,
        "KB501": Status.PASS,
    }
    assert results["KB308"].reason.startswith("not judged: needs `interleaved`, about ")
    assert set(case.summary()["left_out"]) == {"interleaved"}


def test_a_case_without_a_limit_leaves_nothing_out(monkeypatch):
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="reference")
    case = open_case(spec, REFERENCE, rules=[rules()["KB507"]])
    assert judge(rules()["KB507"], case).status is Status.PASS
    assert "left_out" not in case.summary()
    assert isinstance(case, Case)
    assert case.budget is not None
    assert case.budget.left == 0.0


def test_each_pass_takes_some_time():
    sizes = planning.Sizes.of(opened("tiny:llama").base, CaseSpec(model="tiny:llama", quant="nf4", implementation="x"))
    for field in dataclasses.fields(Passes):
        assert 0 < planning.seconds(Passes(**{field.name: 1}), sizes, planning.machine()) < 10, field.name


def test_free_memory_is_some():
    assert 1 << 20 < free_bytes("cpu") < 1 << 50


def with_fields(tmp_path, **fields):
    config = json.loads((CONFIGS / "smollm-135m.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    return tmp_path


def test_a_published_config_of_another_quantizer_is_told_of(tmp_path):
    folder = with_fields(tmp_path, quantization_config={"quant_method": "fp8"}, auto_map={"AutoConfig": "a.B"})
    case = opened(folder)
    assert case.why == "no weights were read; its own fp8 quantization is not verified, sizes are those of nf4"
    assert case.weights.parameters == 134_515_008
    assert judge(rules()["KB908"], case).status is Status.FAIL


def test_the_checkpoints_own_quantization_is_kept(tmp_path):
    own = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    case = opened(with_fields(tmp_path, quantization_config=own), quant="int8")
    assert {layer.scheme for layer in case.base.layers.values()} == {"int8"}
    with pytest.raises(UsageError, match="already quantized"):
        opened(tmp_path, quant="nf4")


def test_a_config_without_weights_can_only_be_static(tmp_path):
    with pytest.raises(UsageError, match="--random-weights"):
        opened(with_fields(tmp_path), static="never")
    assert isinstance(opened(tmp_path), StaticCase)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"architectures": ["LlamaModel"]}, "computes no loss"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
    ],
)
def test_a_broken_config_is_wrong_usage(tmp_path, fields, told):
    with pytest.raises(UsageError, match=told):
        opened(with_fields(tmp_path, **fields))


@pytest.mark.parametrize(
    ("implementation", "mode"),
    [
        ("peft", "reentrant"),
        ("peft==0.13.2", "reentrant"),
        ("peft>=0.13,<1", "reentrant"),
        ("peft:prepare_model_for_kbit_training", "reentrant"),
        ("peft.utils.other:prepare_model_for_kbit_training", "reentrant"),
        ("peft.py:prepare", "non-reentrant"),
        ("peft-fork==1.0", "non-reentrant"),
        ("my/peft.py:prepare", "non-reentrant"),
        ("reference", "non-reentrant"),
    ],
)
def test_peft_is_predicted_reentrant_however_it_is_named(implementation: str, mode: str) -> None:
    assert default_mode(implementation) == mode


@pytest.mark.parametrize(
    ("gpu", "autocast", "expected"),
    [
        ("", "default", (AMPERE, torch.bfloat16)),
        ("T4", "default", ((7, 5), torch.float16)),
        ("T4", "bf16", ((7, 5), torch.bfloat16)),
        ("V100", "none", ((7, 0), None)),
        ("H100", "default", ((9, 0), torch.bfloat16)),
    ],
)
def test_autocast_is_what_the_gpu_can(gpu, autocast, expected):
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="none", device="auto", gpu=gpu, autocast=autocast)
    runtime = runtime_of(spec, "cuda")
    assert (runtime.capability, runtime.autocast) == expected
    if autocast == "default":
        assert runtime_of(spec, "cpu").autocast == torch.bfloat16


def test_the_table_of_gpus_takes_their_kernels():
    spec = CaseSpec(model="tiny:llama", quant="nf4", implementation="none", device="auto", gpu="V100")
    runtimes = {size: runtime_of(on_gpu_of(size, spec), "cuda") for size in GPUS}
    assert {size >> 30 for size, runtime in runtimes.items() if runtime.capability < AMPERE} == {16}
    assert runtimes[16 << 30].autocast == torch.float16


def test_a_profile_of_mixed_dtypes_runs_under_autocast_alone():
    forecast = opened(CONFIGS / "smollm-135m.json", profile="qlora", seq_len=16).forecast
    assert (forecast.autocast, forecast.compared, forecast.missing) == ("bf16", {}, "")
    forecast = opened(CONFIGS / "smollm-135m.json", profile="qlora", seq_len=16, autocast="none").forecast
    assert "leave out --autocast none" in forecast.missing
