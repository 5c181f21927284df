"""Models that leave their place and come back: which moves a base bears, and what KB308 says of one that comes back changed."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.facts import StepOutcome
from kbitcheck.core.result import Party
from kbitcheck.judge.gradients import survives_interleaving
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.moves import MOVES, borne, parameters_after, reloads
from kbitcheck.run.subject import load
from tests.shallow import shallow


@torch.no_grad()
def evaluate(model: Any, *, batch: Any) -> None:
    model.eval()(**batch)


@pytest.mark.parametrize(
    ("quant", "moves"),
    [("nf4", {"move", "state-dict"}), ("int8", {"move", "offload", "offload-to-disk"}), ("nf4,double", {"move", "state-dict"})],
)  # fmt: skip
def test_what_libraries_do_not_let_the_base_do_is_not_asked_of_a_prepared_model(quant: str, moves: set[str]) -> None:
    """As docs/findings/accelerate_offload_4bit.py and int8_state_dict.py show."""
    if quant == "int8" and transformers.__version__.startswith("4."):  # which moves no 8-bit model
        moves = moves - {"move"}
    source = shallow("tiny:gpt2")
    base = source.load(Quantization.parse(quant))
    assert borne(base, partial(evaluate, batch=source.batch(base))) == moves | {"dispatch", "undispatch"}


def test_a_base_that_does_not_run_moves_nowhere() -> None:
    def forward(model: nn.Module) -> None:
        raise RuntimeError("no")

    assert borne(nn.Linear(1, 1), forward) == frozenset()


def test_a_move_that_thaws_the_base_is_not_asked_of_a_prepared_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/findings/quanto_state_dict.py shows."""

    def thaws(model: nn.Module, forward: Any) -> None:
        model[0].weight = nn.Parameter(model[0].weight.detach())  # type: ignore[index]

    monkeypatch.setattr("kbitcheck.observe.moves.MOVES", {"move": MOVES["move"], "state-dict": thaws})
    assert borne(nn.Sequential(nn.Linear(1, 1)), lambda model: None) == {"move"}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_leaves_a_plain_model_as_it_was(name: str) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    kept: Any = {"first": first.weight, "bias": second.bias}
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    seen: list[bool] = []
    after = parameters_after(
        model, kept, lambda: MOVES[name](model, lambda m: seen.append(m(torch.ones(1, 3)).isfinite().all().item()))
    )
    assert seen == [True] * (name in ("dispatch", "offload", "offload-to-disk"))
    assert hasattr(first, "_hf_hook") == (name == "dispatch")
    MOVES["undispatch"](model, lambda m: None)
    assert not hasattr(first, "_hf_hook")
    assert after["first"] is model.get_parameter("0.weight")
    assert after["bias"] is model.get_parameter("1.bias")
    assert {n: torch.equal(p, before[n]) for n, p in model.named_parameters(remove_duplicate=False)} == dict.fromkeys(
        before, True
    )


@pytest.mark.parametrize(
    ("base", "party"), [(("q", "k"), Party.MODEL), (("k",), Party.IMPLEMENTATION), ((), Party.IMPLEMENTATION)]
)
def test_bits_that_the_bases_move_changes_too_are_no_fault_of_the_preparation(base: Any, party: Party) -> None:
    def moved(changed: Any) -> StepOutcome:
        return StepOutcome(step="14 move", raised=None, changed=changed, hooks_added=0, gradients={})

    facts: Any = SimpleNamespace(
        conditions="all", seed=0, interleaved=[moved(("q",))], unprepared=SimpleNamespace(interleaved=[moved(base)]),
        base=SimpleNamespace(parameters={}), plain_run=SimpleNamespace(inexact=()),
    )  # fmt: skip
    ran, bits = inspect.unwrap(survives_interleaving)(facts)
    assert ran.ok
    assert (bits.ok, bits.party) == (False, party)


@pytest.mark.parametrize(("damage", "kept"), [("", True), ("bits", False), ("unread", False), ("unrun", False)])
def test_a_base_that_libraries_do_not_reload_as_it_was_is_not_asked_for(damage: str, kept: bool) -> None:
    """As an FP8 checkpoint that is unpacked on load (docs/findings/fp8_unpacked_on_load.py)."""
    base: Any = nn.Linear(2, 2)
    base.save_pretrained = lambda folder: torch.save(base.state_dict(), f"{folder}/weights")

    def reloaded(folder: str) -> nn.Module:
        again = nn.Linear(2, 3 if damage == "unread" else 2)
        again.load_state_dict(torch.load(f"{folder}/weights"))
        if damage == "bits":
            again.weight.data += 1
        return nn.Identity(again) if damage == "unrun" else again

    def forward(model: nn.Module) -> None:
        model.weight.sum()  # type: ignore[operator]

    def bits(model: Any) -> Any:
        return [] if damage == "unrun" else model.weight.tolist()

    assert reloads(base, reloaded, forward, bits) is kept


@pytest.mark.parametrize("quant", ["nf4,double", "int8"])
def test_a_base_that_was_saved_and_loaded_is_prepared_again_and_trains_on(quant: str) -> None:
    taken = session("peft", quant)
    before = taken.model
    for name in ("train", "update", "reload", "train"):
        outcome = taken.do(name)
        assert (outcome.raised, outcome.changed, [n for n, d in outcome.gradients.items() if not d.equal]) == (
            None, (), []
        )  # fmt: skip
    assert taken.model is not before
    assert outcome.hooks_added == 0
    assert taken.model.get_base_model().hf_quantizer.pre_quantized


def test_what_a_model_hooks_in_its_first_forward_is_not_counted_again_once_another_is_loaded() -> None:
    """As LLaVA's vision tower does, whose hidden states transformers takes by hooks."""
    spec = CaseSpec(model="tiny:llava", quant="nf4", implementation="reference", checkpointing="reentrant")
    taken = Case(spec, load("reference").function, Loaded.from_source(shallow("tiny:llava"), spec)).session()
    added = [taken.do(name).hooks_added for name in ("train", "train", "reload", "train")]
    assert added == [0, 0, 0, 0]


def session(adapters: str, quant: str = "int8") -> Any:
    spec = CaseSpec(
        model="tiny:gpt2", quant=quant, implementation="reference", checkpointing="reentrant", adapters=adapters
    )
    return Case(spec, load("reference").function, Loaded.from_source(shallow("tiny:gpt2"), spec)).session()


def test_adapters_of_peft_are_off_in_one_evaluation_and_train_on() -> None:
    pytest.importorskip("peft")
    taken = session("peft")
    assert hasattr(taken.model, "disable_adapter")
    ran: list[bool] = []
    inner = taken.model
    inner.register_forward_pre_hook(
        lambda *args: ran.append(any(getattr(m, "disable_adapters", False) is True for m in inner.modules()))
    )
    for name in ("train", "adapters-off", "offload", "train"):
        outcome = taken.do(name)
        assert (outcome.raised, outcome.changed, [n for n, d in outcome.gradients.items() if not d.equal]) == (
            None, (), []
        )  # fmt: skip
    assert ran.count(True) == 1
