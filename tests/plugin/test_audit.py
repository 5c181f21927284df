"""``audit`` prepares and runs the caller's own model, which is afterwards what it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kbitcheck_reference import prepare_model_for_kbit_training
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

import kbitcheck
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.result import Status
from kbitcheck.observe.lent import why_no_step
from tests.few_steps import EACH_HALF
from tests.plugin.traces import everything
from tests.shallow import shallow


@pytest.fixture(scope="module", params=["nf4,double", "int8"])
def model(request: pytest.FixtureRequest) -> Any:
    return shallow("tiny:gpt2").load(Quantization.parse(request.param), "cpu")


@EACH_HALF
def test_it_leaves_no_trace(model: Any, codes: tuple[str, ...]) -> None:
    before = everything(model)
    report = kbitcheck.audit(model, prepare=prepare_model_for_kbit_training, select=codes)
    after = everything(model)
    assert {key: before[key] == after[key] for key in before} == dict.fromkeys(before, True)
    judged = {r.rule for r in report if r.status is Status.PASS}
    assert judged >= {"KB104", "KB205", "KB210", "KB304", "KB308", "KB309", "KB403", "KB508", "KB601"} & {*codes}


@pytest.mark.parametrize("attached", [False, True])
def test_a_model_that_is_prepared_already_breaks_no_rule(attached: bool) -> None:
    """Checkpointing is on before the audit's own calls, and a wrapper saves its adapters alone."""
    model: Any = prepare_model_for_kbit_training(shallow("tiny:llama").load(Quantization.parse("nf4"), "cpu"))
    if attached:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    report = kbitcheck.audit(model, prepare=prepare_model_for_kbit_training, select=["KB501", "KB505", "KB510"])
    assert [r.rule for r in report if r.status is not Status.PASS] == []


def test_it_leaves_no_trace_where_the_preparation_raises(model: Any) -> None:
    def raises(model: Any, *args: Any, **kwargs: Any) -> Any:
        prepare_model_for_kbit_training(model, *args, **kwargs)
        raise ValueError("too late")

    before = everything(model)
    report = kbitcheck.audit(model, prepare=raises, select=["KB101", "KB502"])
    assert everything(model) == before
    assert "too late" in str(report)


def test_it_leaves_no_trace_where_it_is_interrupted(model: Any) -> None:
    def interrupted(model: Any, *args: Any, **kwargs: Any) -> Any:
        prepare_model_for_kbit_training(model, *args, **kwargs)
        raise KeyboardInterrupt

    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        kbitcheck.audit(model, prepare=interrupted)
    assert everything(model) == before


def test_no_step_runs_where_none_is_allowed(model: Any) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError

    handle = model.register_forward_pre_hook(refuse)
    try:
        report = kbitcheck.audit(model, prepare=prepare_model_for_kbit_training, allow_step=False)
    finally:
        handle.remove()
    results = {r.rule: r for r in report}
    assert results["KB101"].status is Status.PASS
    for code in ("KB210", "KB304", "KB308", "KB405"):
        assert "allow_step=False" in results[code].reason
    assert {r.rule: r.reason for r in report if r.status is Status.ERROR} == {}


def test_numbers_written_in_place_are_restored(model: Any) -> None:
    def overwrites(model: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.transformer.ln_f.weight.add_(1)
        return prepare_model_for_kbit_training(model, *args, **kwargs)

    before = everything(model)
    kbitcheck.audit(model, prepare=overwrites, select=["KB101"])
    assert everything(model) == before


def test_what_nothing_restores_is_told(model: Any) -> None:
    def overwrites(model: Any, *args: Any, **kwargs: Any) -> Any:
        model.transformer.h[0].mlp.c_fc.weight.data.view(torch.uint8).view(-1)[:1].add_(1)
        return prepare_model_for_kbit_training(model, *args, **kwargs)

    mine = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"something wrote into transformer.h.0.mlp.c_fc.weight in place"):
        kbitcheck.audit(mine, prepare=overwrites, select=["KB101"])


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_where_other_ranks_would_wait_no_step_is_taken(model: Any, one_rank: None) -> None:
    sharded = torch.nn.Linear(2, 2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded.weight = torch.nn.Parameter(torch.distributed.tensor.distribute_tensor(sharded.weight.detach(), mesh))
    assert "allow_step=True on every rank" in why_no_step(sharded, allow_step=None)
    assert why_no_step(sharded, allow_step=True) == why_no_step(model, allow_step=None) == ""


def test_a_model_that_ddp_wraps_is_judged_inside(model: Any, one_rank: None) -> None:
    peft = pytest.importorskip("peft")
    prepared = prepare_model_for_kbit_training(copy.deepcopy(model), True, {"use_reentrant": False})
    wrapped = DistributedDataParallel(peft.get_peft_model(prepared, peft.LoraConfig(target_modules="all-linear")))
    ids = torch.arange(24).reshape(2, 12)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    before = everything(wrapped.module)
    report = kbitcheck.assert_prepared(wrapped, select=["KB304", "KB403"])
    assert everything(wrapped.module) == before
    assert {r.rule: r.status for r in report} == {"KB304": Status.PASS, "KB403": Status.PASS}


def test_a_model_without_a_loss_is_audited_and_reloaded_by_its_own_class(tmp_path: Path) -> None:
    quant = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, **heads)
    transformers.LlamaModel(config).bfloat16().save_pretrained(tmp_path)
    model = transformers.LlamaModel.from_pretrained(tmp_path, quantization_config=quant, dtype=torch.bfloat16)
    report = kbitcheck.audit(model, prepare="reference", select=["KB302", "KB304", "KB403", "KB510"])
    assert {r.rule: (r.status, r.reason, r.failures) for r in report if r.status is not Status.PASS} == {}
