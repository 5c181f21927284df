"""Facts about code paths on a cut: the same verdicts as on the whole model, whatever a preparation does where."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
from kbitcheck_reference import prepare_model_for_kbit_training
from torch import nn

import kbitcheck
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core import machine
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import CutFacts
from kbitcheck.core.result import Result, Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.models.sources.architecture import named
from kbitcheck.observe.case import ON_CUT, Case, facts_of
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.outputs import Outputs
from kbitcheck.observe.probes import digest
from kbitcheck.sabotage.helpers import blocks, subclass
from tests.deep import deep
from tests.few_steps import EACH_HALF, MANY_STEPS

MODEL = "arch:llama"
CUT = "2 of 6 blocks"
PATHS = (
    "KB106",
    "KB209",
    "KB210",
    "KB306",
    "KB307",
    "KB308",
    "KB404",
    "KB504",
    "KB505",
    "KB506",
    "KB508",
    "KB510",
    "KB512",
)


@cache
def base(cut: str) -> Loaded:
    return Loaded.from_source(deep(named(MODEL)), spec(cut))


def spec(cut: str) -> CaseSpec:
    return CaseSpec(model=MODEL, quant="nf4", implementation="", checkpointing="reentrant", cut=cut)  # type: ignore[arg-type]


def case(cut: str, prepare: Callable[..., Any] = prepare_model_for_kbit_training) -> Case:
    return Case(spec(cut), prepare, base(cut))


def judged(opened: Case, codes: Iterable[str]) -> dict[str, Result]:
    return {code: judge(rules()[code], opened) for code in codes}


def broken(opened: Case, codes: Iterable[str]) -> set[str]:
    return {code for code, result in judged(opened, codes).items() if result.status is not Status.PASS}


@EACH_HALF
def test_every_rule_says_the_same_of_a_cut_and_says_where_it_looked(codes: tuple[str, ...]) -> None:
    whole, cut = (judged(case(when), codes) for when in ("never", "always"))
    said = {code: (result.status, result.reason) for code, result in whole.items()}
    differing = {
        code: (whole[code], result) for code, result in cut.items() if (result.status, result.reason) != said[code]
    }
    assert differing == {}
    assert {code for code, result in cut.items() if result.cut} >= {*PATHS} & {*codes}
    assert {result.cut for result in whole.values()} == {""}
    if codes == MANY_STEPS:
        return
    assert {result.cut for result in cut.values()} == {"", CUT}
    for code in ("KB101", "KB203", "KB206", "KB305", "KB405", "KB406", "KB603"):
        assert cut[code].cut == ""
        assert cut[code].examined == whole[code].examined  # over all names
    for code in ("KB303", "KB304"):  # over all names, and once more over those of the cut
        assert cut[code].cut == CUT
        assert whole[code].examined / 2 < cut[code].examined < whole[code].examined


def test_a_tiny_model_is_not_cut_unless_it_is_requested() -> None:
    opened = case("if-large")
    assert opened.cut == CutFacts()
    assert opened._paths.case is opened


def test_every_fact_of_forwards_runs_on_the_cut() -> None:
    assert facts_of(Outputs) <= ON_CUT
    opened = case("always")
    assert opened.forwards is opened._paths.case.forwards
    assert opened._paths.case is not opened
    assert len(blocks(opened._paths.case._loaded.pristine)) == 2
    assert len(opened.plain_run.blocks) == 6


def damaged(damage: Callable[[Any], None]) -> Callable[..., Any]:
    def prepare(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        damage(model)
        return model

    return prepare


def another_mask(model: Any) -> None:
    """The last block is recomputed with another dropout mask."""
    from torch.utils.checkpoint import checkpoint

    blocks(model)[-1]._gradient_checkpointing_func = functools.partial(
        checkpoint, use_reentrant=True, preserve_rng_state=False
    )


def nothing_in_eval(model: Any) -> None:
    """The last block raises in eval mode."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            raise RuntimeError("not in eval mode")
        return super(type(self), self).forward(*args, **kwargs)

    subclass(blocks(model)[-1], forward=forward)


def half_norm(model: Any) -> None:
    """A norm of the last block is in half precision again."""
    blocks(model)[-1].input_layernorm.bfloat16()


def unsaved(model: Any) -> None:
    """The last block's norm has another name in a state dict."""
    last = blocks(model)[-1]
    last.norm_too = last.input_layernorm


def none_beyond_64_tokens(model: Any) -> None:
    """Blocks checkpoint no longer inputs."""
    for block in blocks(model):
        block._gradient_checkpointing_func = functools.partial(_unless_long, block._gradient_checkpointing_func)


def _unless_long(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if args[0].shape[1] > 64:
        return function(*args, **kwargs)
    return checkpoint(function, *args, **kwargs)


def deep_alone(damage: Callable[[Any], None]) -> Callable[[Any], None]:
    """The damage where the model has more than four blocks, which a cut has not."""

    def damage_deep(model: Any) -> None:
        if len(blocks(model)) > 4:
            damage(model)

    return damage_deep


def fifth_alone(model: Any) -> None:
    """As ``nothing_in_eval``, in a block that is neither in a cut nor the last one."""
    nothing_in_eval_of = blocks(model)[4:5]
    for block in nothing_in_eval_of:
        subclass(block, forward=_raising)


def _raising(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not self.training:
        raise RuntimeError("not in eval mode")
    return super(type(self), self).forward(*args, **kwargs)


FAULTS = [
    ("KB307", another_mask),
    ("KB210", nothing_in_eval),
    ("KB201", half_norm),
    ("KB510", unsaved),
    ("KB307", deep_alone(another_mask)),
    *(
        pytest.param(code, deep_alone(damage), marks=pytest.mark.slow)
        for code, damage in (("KB210", nothing_in_eval), ("KB201", half_norm), ("KB510", unsaved))
    ),
    ("KB210", fifth_alone),
]


@pytest.mark.parametrize(("code", "damage"), FAULTS)
def test_a_fault_outside_the_cut_is_caught_and_the_whole_model_is_used(
    code: str, damage: Callable[[Any], None]
) -> None:
    assert broken(case("never", damaged(damage)), [code]) == {code}
    opened = case("always", damaged(damage))
    assert broken(opened, [code]) == {code}
    assert opened.cut.towers == ()
    assert "otherwise" in opened.cut.reason


def test_a_call_that_raises_on_the_cut_alone_runs_on_the_whole_model() -> None:
    def picky(model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Any = None) -> Any:
        if len(blocks(model)) < 6:
            raise ValueError("too short")
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)

    opened = case("always", picky)
    assert broken(opened, ["KB210", "KB504"]) == set()
    assert opened.cut.reason.startswith("preparation raised ValueError: too short")


def test_a_fault_in_every_block_is_caught_on_the_cut() -> None:
    def none_in_eval(model: Any) -> None:
        for block in blocks(model):
            subclass(block, forward=_raising)

    opened = case("always", damaged(none_in_eval))
    assert broken(opened, ["KB210"]) == {"KB210"}
    assert str(opened.cut) == CUT


def test_checkpoints_of_a_drawn_batch_are_counted_on_the_cut() -> None:
    opened = case("always", damaged(none_beyond_64_tokens))
    (result,) = judged(opened, ["KB310"]).values()
    assert result.cut == CUT
    assert [(f.expected, f.actual) for f in result.failures] == [("2 checkpoints", "0 checkpoints")]


def test_a_forward_of_the_whole_model_in_eval_mode_is_judged_too() -> None:
    """A fault that no setting of a module shows: code that all blocks share raises in one of them."""

    def one_in_eval(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training and self.self_attn.layer_idx == 4:
            raise RuntimeError("not in eval mode")
        return super(type(self), self).forward(*args, **kwargs)

    def damage(model: Any) -> None:
        for block in blocks(model):
            subclass(block, forward=one_in_eval)

    opened = case("always", damaged(damage))
    (result,) = judged(opened, ["KB210"]).values()
    assert [f.where for f in result.failures] == ["forward (eval, the whole model)"]
    assert str(opened.cut) == CUT


def test_a_hook_that_counts_is_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(model: nn.Module) -> None:
        blocks(model)[5 if len(blocks(model)) > 5 else 0].register_forward_hook(lambda *_: None)

    opened = case("always", damaged(damage))
    assert opened.cut.towers == ()


def bits(model: nn.Module) -> dict[str, str]:
    return {name: digest.bits(parameter) for name, parameter in model.named_parameters()}


@EACH_HALF
def test_a_callers_model_is_cut_and_left_as_it_was(codes: tuple[str, ...]) -> None:
    model = deep(named(MODEL)).load(Quantization.parse("nf4"))
    before = bits(model)
    selected = [code for code in (*PATHS, "KB101", "KB304", "KB405") if code in codes]
    whole, cut = (
        kbitcheck.audit(model, prepare="reference", select=selected, cut=when) for when in ("never", "always")
    )
    assert bits(model) == before
    assert [(r.rule, r.status) for r in cut.results] == [(r.rule, r.status) for r in whole.results]
    assert {r.rule for r in cut.results if r.cut == CUT} >= {*PATHS} & {*codes}


@EACH_HALF
def test_a_prepared_model_with_adapters_is_cut(codes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    model = deep(named(MODEL)).load(Quantization.parse("nf4"))
    prepare_model_for_kbit_training(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    before = bits(wrapped)
    small = kbitcheck.assert_prepared(wrapped, select=codes)
    monkeypatch.setattr(machine, "LARGE_BYTES", 0)
    large = kbitcheck.assert_prepared(wrapped, select=codes)
    assert bits(wrapped) == before
    assert [(r.rule, r.status) for r in large.results] == [(r.rule, r.status) for r in small.results]
    assert {r.rule for r in large.results if r.cut} >= {"KB306", "KB307", "KB310", "KB311"} & {*codes}
    assert {r.cut for r in large.results} == {"", "3 of 6 blocks"}  # the reference hooks the first block
    assert {r.cut for r in small.results} == {""}


def test_optimizer_steps_of_the_whole_model_leave_it_as_it_was() -> None:
    opened = case("always")
    before = bits(opened._wrapped.attached.model)
    adapters = {name for name, t in opened.trained.parameters.items() if t.adapter}
    assert opened.updated == adapters
    assert bits(opened._wrapped.attached.model) == before
    assert {name for name, t in opened.trained.parameters.items() if t.bits != before[name]} == adapters


def test_a_base_that_optimizer_steps_change_takes_no_more_steps() -> None:
    """The whole model is made again for the facts that follow."""

    def drifting(model: Any) -> None:
        def drift(module: Any, *_: Any) -> None:
            module.weight.data.mul_(1.01)

        model.model.norm.register_forward_hook(drift)

    opened = case("always", damaged(drifting))
    stepped = opened._wrapped.attached.model
    assert opened.trained.parameters["model.norm.weight"].bits != opened.wrapped.parameters["model.norm.weight"].bits
    assert opened._wrapped.attached.model is not stepped
