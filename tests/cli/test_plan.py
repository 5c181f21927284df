"""``kbitcheck model --plan``, and what a report says of facts that were left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kbitcheck.cli.app import run
from kbitcheck.core.events import Collector, Computing, Figures, Judged, Planned, from_json
from kbitcheck.core.facts import Passes
from kbitcheck.core.pace import duration
from kbitcheck.core.plan import Item, Plan
from kbitcheck.core.report import Report, assemble
from kbitcheck.core.result import Level, Result, Status
from kbitcheck.report import verdict
from kbitcheck.report.parts.header import header
from kbitcheck.report.tables.plan import render
from tests.cli.conftest import Door

WHY = "about 210 s; --timeout 600 allows it"
PLAN = Plan(
    case="m-nf4-off",
    opening=2.0,
    items=(
        Item(fact="run", on="whole", passes=Passes(forwards=1, backwards=1), seconds=3.0, nbytes=10, rules=("KB103",)),
        Item(
            fact="interleaved",
            on="cut",
            passes=Passes(forwards=15),
            seconds=210.0,
            nbytes=20,
            rules=("KB308",),
            left_out=f"not judged: needs `interleaved`, {WHY}",
        ),
    ),
)


@pytest.mark.usefixtures("forked_workers")
def test_a_plan_is_printed_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["model", "tiny:llama", "--prepare", "reference", "--quant", "nf4", "--checkpointing", "off"]
    assert run([*arguments, "--checkpointing", "reentrant", "--plan", "--format", "json"]) == 0
    first, second = map(Plan.from_json, json.loads(capfd.readouterr().out)["plans"])
    assert (first.case, second.case) == ("tiny:llama-nf4-off", "tiny:llama-nf4-reentrant")
    assert first.of("twins") is not None
    assert second.of("twins") is None  # the first case has them
    assert first.of("start") is None  # that of a plain LoRA is zero
    assert first.of("against_other_mode") is None  # no rule needs it without checkpointing
    mode = second.of("against_other_mode")
    assert mode is not None
    assert (mode.rules, mode.passes) == (("KB306",), Passes(forwards=1, backwards=1))
    assert 0 < second.seconds < first.seconds < 600
    assert 0 < first.nbytes < 10e6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [("--static",), ("--format", "html")])
def test_a_plan_goes_without(door: Door, extra: tuple[str, ...]) -> None:
    ran = door("model", "tiny:llama", "--plan", *extra)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert "--plan goes without --static" in ran.stderr


def test_the_text_says_what_is_left_out_and_for_which_rules() -> None:
    text = render([PLAN], "text")
    assert "KB308 not judged: needs `interleaved`, about 210 s; --timeout 600 allows it" in text
    (total,) = (line for line in text.splitlines() if line.startswith("  in all"))
    assert total.split() == ["in", "all", "1", "f", "1", "b", "5.00", "0.0", "MB"]


@pytest.mark.parametrize("event", [Planned(plan=PLAN), Computing(case="m", fact="run", left=2.5)])
def test_events_cross_the_pipe(event: Planned | Computing) -> None:
    assert from_json(json.loads(json.dumps(event.as_json()))) == event


def report(warns: Level | None = None, **facts: object) -> Report:
    """The report of a model: a rule that is kept, facts, and one that is broken where ``warns`` says at which level."""
    collector = Collector()
    for status in (Status.PASS, Status.SKIP):
        collector.add(Judged(result=Result(rule="KB101", case="m", level=Level.MUST, status=status)))
    if warns:
        collector.add(Judged(result=Result(rule="KB106", case="m", level=warns, status=Status.FAIL)))
    collector.add(Figures(case="m", facts=facts))
    return assemble(
        collector, {"m": {"implementation": "peft", "model": "m", "quant": "nf4"}}, subject={"command": "model"}
    )


def test_the_verdict_names_what_was_left_out() -> None:
    whole, part = report(), report(left_out={"interleaved": WHY})
    assert verdict(whole).startswith("✓ ready")
    assert verdict(part).startswith("✓ nothing rules it out")
    assert verdict(part).endswith(f"left out: interleaved ({WHY})")
    assert part.exit_code == whole.exit_code == 0


def test_the_verdict_says_that_warnings_keep_no_model_from_training() -> None:
    harmless = "no warning keeps this model from training"
    assert verdict(report(Level.SHOULD)) == f"✓ ready: 1 warning, 1 kept; {harmless}"
    assert verdict(report()) == "✓ ready: 1 kept"
    assert harmless not in verdict(report(Level.MUST)) + verdict(report(Level.SHOULD, static={}))


def test_durations_are_short() -> None:
    assert [duration(s) for s in (3.4, 99.4, 150.0)] == ["3 s", "99 s", "2 min"]


MIXTURE: dict[str, Any] = {"parameters": 46_700_000_000, "quantized": 700_000_000, "unquantized_bytes": 92 << 30}


def test_what_is_hardly_quantized_is_said_in_the_first_line_and_in_the_verdict() -> None:
    share = "1.5 % quantized, the other weights take 92 GiB"
    hardly = report(static="no weights were read", model_class="MixtralForCausalLM", **MIXTURE)
    assert f"(MixtralForCausalLM, 46.7 B, {share})" in header(hardly)
    assert verdict(hardly).startswith("✓ nothing rules it out: 1 kept")
    assert verdict(hardly).endswith(f"; only {share}")
    mostly = report(**{**MIXTURE, "quantized": 46_600_000_000})
    assert "99 % quantized" in header(mostly)
    assert "quantized" not in verdict(mostly)


def test_what_does_not_fit_the_memory_that_was_asked_for_is_the_verdict() -> None:
    answer = {"memory": 16 << 30, "fits": False}
    assert verdict(report(static="no weights", forecast={"answer": answer})).startswith("! does not fit 16 GiB: ")
    assert verdict(report(static="no weights", forecast={"answer": {**answer, "fits": True}})).startswith("✓ ")
