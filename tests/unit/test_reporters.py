"""Reports in words: grouping, wrapping, order, and the command that runs a finding again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.report import render, verdict
from kbitcheck.report import rule_page as pages
from kbitcheck.report import text as page
from kbitcheck.report.parts.names import grouped


def spelled_out(text: str) -> set[str]:
    """The names that a grouped name stands for."""
    pieces = [
        [str(n) for item in piece[1:-1].split(",") for n in _numbers(item)] if piece.startswith("{") else [piece]
        for piece in re.split(r"(\{[^}]*\})", text)
    ]
    return {"".join(choice) for choice in itertools.product(*pieces)}


def _numbers(item: str) -> list[Any]:
    first, dots, last = item.partition("..")
    return list(range(int(first), int(last) + 1)) if dots else [item]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            [f"model.layers.{i}.input_layernorm.weight" for i in range(32)],
            ["model.layers.{0..31}.input_layernorm.weight"],
        ),
        (["h.1.x", "h.3.x", "h.5.x"], ["h.{1,3,5}.x"]),
        (["h.0", "h.1"], ["h.{0,1}"]),
        ([f"l.{i}.mlp.{n}_proj" for i in range(3) for n in ("up", "down")], ["l.{0..2}.mlp.{up,down}_proj"]),
        (
            [f"l.{i}.e.{j}.w" for i in range(3) for j in range(4) if (i, j) != (2, 3)],
            ["l.{0,1}.e.{0..3}.w", "l.2.e.{0..2}.w"],
        ),
        (["lm_head", "lm_head"], ["lm_head"]),
        (["save and reload", "a.b"], ["a.b", "save and reload"]),
        ([], []),
    ],
)
def test_names_are_grouped(names: list[str], told: list[str]) -> None:
    assert grouped(names) == told


part = st.sampled_from(["0", "1", "2", "10", "007", "layers", "up_proj", "down_proj", "_a", "b"])


@given(st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), max_size=30))
def test_grouping_loses_and_adds_no_name(names: list[str]) -> None:
    told = [spelled_out(text) for text in grouped(names)]
    assert set().union(*told) == set(names)
    assert sum(map(len, told)) == len(set(names))


def spec(**changes: Any) -> CaseSpec:
    return CaseSpec(**{"model": "tiny:llama", "quant": "nf4", "implementation": "peft", "device": "auto", **changes})


def failed(rule: str, case: str, *failures: Observation, level: Level = Level.MUST) -> Result:
    party = next(iter(failures)).party
    return Result(
        rule=rule, case=case, level=level, status=Status.FAIL, attributed_to=party, examined=9, failures=failures
    )


def report(*results: Result, specs: tuple[CaseSpec, ...] = (spec(),), **changes: Any) -> Report:
    subject = {
        "command": "impl",
        "implementation": {"name": "peft", "version": "0.21.2"},
        "cases": {s.id: s.as_json() for s in specs},
        **changes.pop("subject", {}),
    }
    return Report(
        **{"tool": "kbitcheck 0", "environment": {}, "subject": subject, "results": results, "blame": "own", **changes}
    )


CASE = spec().id
OWN = Observation("model.norm", "float32", "float16", ok=False)
STACK = Observation("model.norm", "float32", "float16", ok=False, party=Party.STACK, witness="a bare layer")


def test_broken_rules_come_worst_first_and_each_says_who_it_is_attributed_to() -> None:
    text = render(
        report(
            failed("KB101", CASE, OWN, level=Level.INFO),
            failed("KB102", CASE, STACK),
            failed("KB103", CASE, OWN, level=Level.SHOULD),
            Result(rule="KB104", case=CASE, level=Level.MUST, status=Status.ERROR, reason="it broke"),
            failed("KB201", CASE, OWN),
        ),
        "text",
    )
    heads = [line for line in text.splitlines() if line[:2] in ("✗ ", "! ")]
    assert [re.findall(r"KB\d+", head) for head in heads] == [[], ["KB201"], ["KB104"], ["KB102"], ["KB103"], ["KB101"]]
    assert [head[0] for head in heads] == ["✗", "✗", "✗", "!", "!", "!"]
    assert heads[1].endswith("attributed to peft")
    assert heads[3].endswith("attributed to the stack")


def test_one_failure_in_several_cases_is_told_once() -> None:
    specs = (spec(), spec(checkpointing="off"), spec(checkpointing="reentrant"))
    found = report(*(failed("KB201", s.id, OWN) for s in specs[:2]), failed("KB201", specs[2].id, STACK), specs=specs)
    text = render(found, "text")
    assert text.count("found float16") == 2
    assert "In tiny:llama-nf4-default, tiny:llama-nf4-off:\n" in text
    assert verdict(found) == "✗ does not conform: 1 rule broken, 0 kept"


def test_a_rule_that_fails_in_several_ways_is_told_once_with_each() -> None:
    specs = tuple(spec(model=f"m{i}") for i in range(8))
    other = Observation("lm_head", "float32", "bfloat16", ok=False)
    found = report(*(failed("KB201", s.id, OWN if i < 6 else other) for i, s in enumerate(specs)), specs=specs)
    text = render(found, "text")
    assert text.count("✗ KB201") == text.count("You will see: ") == text.count("Again: ") == 1
    first = "m0-nf4-default, m1-nf4-default, m2-nf4-default, m3-nf4-default, and 2 more"
    assert re.search(
        rf"In {first}:\n    - model.norm\n.*\n    In m6-nf4-default, m7-nf4-default:\n    - lm_head\n", text
    )
    assert "m5-nf4-default" in render(found, "text", verbose=True)


def test_a_long_name_stays_beside_its_dash_and_a_unit_beside_its_number() -> None:
    name = "model.layers." + "x" * 80
    sizes = Observation(name, "at most 12 MB " * 40, "1 GB", ok=False)
    text = page.render(report(failed("KB405", CASE, sizes)), width=80)
    assert f"\n    - {name}\n" in text
    assert not [line for line in text.splitlines() if re.match(r" *(MB|GB)\b", line)]
    assert "12 MB" in text


FORECAST = {
    "groups": {"mlp": {"packed": 900, "state": 0, "unquantized": 0, "buffers": 0, "upcast": {"peft": 100}}},
    "profile": "peft", "loaded": 900, "upcast": 100, "adapters": 50, "batch": 2, "seq_len": 24, "logits": 10,
    "optimizer": {"adamw": 100, "adamw-8bit": 100, "paged-adamw": 100}, "device": "cpu", "mode": "reentrant",
    "activations": {"off": {"held": 80, "peak": 90}, "reentrant": {"held": 80, "peak": 90}},
    "total": {"reentrant": 2000}, "memory": None, "missing": "",
    "notes": (), "rooms": {str(16 << 30): "T4"}, "largest_batch": {str(16 << 30): 9}, "longest": {str(16 << 30): 512},
}  # fmt: skip


def report_lines(forecast: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """The lines of a report on one case."""
    found = report(
        specs=(spec(),), subject={"command": "model"}, facts={"cases": {spec().id: {**facts, "forecast": forecast}}}
    )
    return render(found, "text").splitlines()


def costs(*forecasts: dict[str, Any]) -> list[str]:
    """The lines on memory of a report on as many cases."""
    specs = tuple(spec(quant=quant) for quant in ("nf4", "int8")[: len(forecasts)])
    cases = {s.id: {"forecast": f} for s, f in zip(specs, forecasts, strict=True)}
    found = report(specs=specs, subject={"command": "model"}, facts={"cases": cases})
    return render(found, "text").splitlines()[4:]


def test_what_is_the_same_in_all_cases_is_told_once_and_the_rest_beside_each_other() -> None:
    (one,) = [line for line in costs(FORECAST) if line.startswith("weights")]
    assert one == "weights     900 B as loaded (mlp 900 B)"
    lines = costs(FORECAST, {**FORECAST, "loaded": 70_000})
    assert "weights     nf4   900 B as loaded (mlp 900 B)" in lines
    assert "            int8  68.4 KiB as loaded (mlp 900 B)" in lines
    assert sum(line.startswith("upcast") for line in lines) == 1
    assert "adapters    50 B, and 100 B for adamw" in lines
    assert not [line for line in lines if "tiny:llama" in line]


KERNELS = {
    "autocast": "none", "activations": {"reentrant": {"held": 80, "peak": 100}}, "compared": {"bf16": {"held": 60, "peak": 60}},
    "attention": {"none": {"math (float32 and grouped queries)": 4}, "bf16": {"flash": 3, "memory-efficient (a mask)": 1}},
}  # fmt: skip


def test_a_measured_step_names_its_conditions() -> None:
    lines = report_lines(FORECAST, {"activations": 70, "checkpointed": 60, "batch": [2, 24]})
    assert "measured    70 B, 60 B checkpointed at 2 × 24, without autocast, as rules judge it" in lines


def test_logits_that_are_most_of_a_step_are_named() -> None:
    for logits, named in ((10, False), (20, True)):
        text = " ".join(" ".join(costs({**FORECAST, "logits": logits})).split())
        assert ("see `--loss fused`, use_liger_kernel=True" in text) is named


def test_a_step_is_described_with_and_without_autocast() -> None:
    lines = costs({**FORECAST, **KERNELS})
    told = "none; under bf16 60 B at the peak with reentrant checkpointing: train with bf16=True"
    assert f"autocast    {told}" in lines
    text = " ".join(" ".join(lines).split())
    assert (
        "attention math (float32 and grouped queries) in 4 layers; under bf16 flash in 3 layers, memory-efficient (a mask) "
        "in 1 layer; math and eager attention keep every score"
    ) in text
    own = {"autocast": "bf16", "compared": {"none": {"held": 80, "peak": 100}}}
    lines = costs({**FORECAST, **KERNELS, **own, "attention": {"bf16": {}, "none": {}}})
    assert "autocast    bf16, as of Trainer(bf16=True)" in lines
    assert not [line for line in lines if line.startswith("attention")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"longest": {}},
            "fits        not searched for: --memory 24GiB answers for one device, --fits for all common GPUs",
        ),
        ({}, "                16      9      512  T4"),
        (
            {"memory": 1, "usual": {"256": {str(16 << 30): 70}, "512": {str(16 << 30): 35}}},
            "fits           GiB    256    512    alone  largest batch by tokens, or the longest alone",
        ),
        ({"total": {"reentrant": 1 << 36}, "longest": {str(16 << 30): 0}}, "fits        none of the common GPUs"),
    ],
)
def test_a_tiny_model_needs_no_table_of_gpus(changes: dict[str, Any], told: str) -> None:
    assert told in costs({**FORECAST, **changes})


@pytest.mark.parametrize(
    ("memory", "told"),
    [
        (24, "fits        unknown for 24 GiB: no step was predicted; 20 GiB stay through training"),
        (16, "too large   for 16 GiB: 20 GiB stay through training, 4 GiB too much; no step was predicted"),
    ],
)
def test_without_a_step_what_stays_may_be_too_much(memory: int, told: str) -> None:
    sizes = {"resident": 19 << 30, "overhead": 1 << 30, "memory": memory << 30}
    lines = costs({**FORECAST, **sizes, "activations": {}, "missing": "it reads numbers"})
    assert lines[0] == told
    assert "a step      not predicted: it reads numbers" in lines


def test_optimizers_that_keep_less_are_told() -> None:
    optimizer = {"adamw": 100, "adamw-8bit": 30, "paged-adamw": 0}
    told = "adapters    50 B, and 100 B for adamw (adamw-8bit: 30 B, paged-adamw: 0 B)"
    assert told in costs({**FORECAST, "optimizer": optimizer})


def test_the_verdict_says_why_no_gradient_rule_was_judged() -> None:
    def skipped(rule: str) -> Result:
        return Result(rule=rule, case=CASE, level=Level.MUST, status=Status.SKIP, reason="there is no batch")

    kept = Result(rule="KB101", case=CASE, level=Level.MUST, status=Status.PASS, examined=4)
    sound = "nothing wrong in what could be looked at (dtypes, flags)"
    told = f"✓ {sound}: 1 kept, 2 not applicable; gradients were not judged: there is no batch"
    ungrounded = report(kept, skipped("KB301"), skipped("KB302"))
    assert (verdict(ungrounded), ungrounded.exit_code) == (told, 0)
    strict = dataclasses.replace(ungrounded, strict=True)
    assert (strict.exit_code, verdict(strict).partition(":")[0]) == (5, "✗ gradients were not judged")
    checkpointed = Result(rule="KB305", case=CASE, level=Level.MUST, status=Status.PASS, examined=4)
    assert verdict(report(kept, checkpointed, skipped("KB302"))).startswith(f"✓ {sound}")
    assert "gradient" not in verdict(report(kept, skipped("KB301"), failed("KB302", CASE, OWN)))
    assert "gradient" not in verdict(report(kept))


def test_a_long_message_keeps_its_beginning_and_the_place_it_ends_with() -> None:
    message = "ValueError: " + "x " * 500 + "(at torch/nn/modules/linear.py:134)"
    error = Result(rule="KB101", case=CASE, level=Level.MUST, status=Status.ERROR, reason=message)
    for form in ("text", "markdown", "html", "junit"):
        text = " ".join(render(report(error), form).split())
        assert "ValueError: x x" in text, form
        assert "(at torch/nn/modules/linear.py:134)" in text, form
        assert "x x … x x" in text, form
    assert "…" not in render(report(error), "text", verbose=True)


def test_one_cause_of_many_errors_is_told_once() -> None:
    errors = [
        Result(rule=f"KB10{i}", case=CASE, level=Level.MUST, status=Status.ERROR, reason="killed by SIGKILL")
        for i in range(1, 7)
    ]
    text = render(report(*errors), "text")
    assert text.count("killed by SIGKILL") == 1
    assert "6 rules (KB101, KB102, KB103, KB104, …) could not be judged" in text


def test_long_findings_are_cut_unless_verbose() -> None:
    many = [Observation(f"{chr(97 + i)}.norm.x" * (i + 1), "float32", f"found {i}", ok=False) for i in range(9)]
    specs = tuple(spec(seed=0, model=f"m{i}") for i in range(6))
    found = report(*(failed("KB201", s.id, *many[: 4 + i]) for i, s in enumerate(specs)), specs=specs)
    brief, whole = (render(found, "text", verbose=v) for v in (False, True))
    assert "… and 1 more (-v lists them)" in brief
    assert "… and otherwise in 3 more cases (-v lists them)" in brief
    assert "(-v lists" not in whole
    assert whole.count("found found 8") == 1


def test_no_name_or_command_is_broken_and_nothing_is_coloured_when_piped() -> None:
    name = "model.language_model." * 12 + "weight"
    found = report(failed("KB201", CASE, Observation(name, "x " * 200, "\x1b[31mred", ok=False)))
    text = render(found, "text")
    assert name in text
    assert "\x1b" not in text
    long = [line for line in text.splitlines() if len(line) > 110]
    assert all(name in line or "Again:" in line for line in long)
    assert "\x1b[" in render(found, "text", terminal=True)


def test_verbose_lists_what_was_kept_and_skipped() -> None:
    kept = Result(rule="KB101", case=CASE, level=Level.MUST, status=Status.PASS, examined=4)
    skipped = Result(rule="KB102", case=CASE, level=Level.MUST, status=Status.SKIP, reason="no adapters")
    brief, whole = (render(report(kept, skipped), "text", verbose=v) for v in (False, True))
    assert "no adapters" not in brief
    assert re.search(r"KB101 .*: 4 examined", whole)
    assert re.search(r"KB102 .*: no adapters", whole)


def test_ignored_rules_and_an_incomplete_run_are_told() -> None:
    text = render(report(complete=False, subject={"ignored": {"KB3": "slow"}}), "text")
    assert "ignored     KB3: slow" in text
    assert "not complete" in text
    assert verdict(report()) == "✗ nothing was checked: 0 kept"


def test_a_rule_that_is_no_more_can_still_be_shown() -> None:
    assert "✗ KB999  (MUST)" in render(report(failed("KB999", CASE, OWN)), "text")


@pytest.mark.parametrize(
    ("changes", "subject", "told"),
    [
        ({}, {}, "impl peft --model tiny:llama --quant nf4 --checkpointing default"),
        ({}, {"command": "model"}, "model tiny:llama --prepare peft --quant nf4"),
        ({"batch": 3, "trust_remote_code": True}, {"command": "model"}, "--batch 3 --trust-remote-code"),
        ({"model": "a b"}, {"in_process": True}, "--model 'a b' --quant nf4 --checkpointing default --in-process"),
    ],
)
def test_the_command_to_run_again(changes: dict[str, Any], subject: dict[str, Any], told: str) -> None:
    one = spec(**changes)
    text = render(report(failed("KB201", one.id, OWN), specs=(one,), subject=subject), "text")
    line = text.partition("Again: ")[2].splitlines()[0]
    assert told in line
    assert shlex.split(line)[-2:] == ["--select", "KB201"]


def test_a_live_callable_has_no_command() -> None:
    one = spec(implementation="test.<locals>.prepare")
    assert "Again" not in render(report(failed("KB201", one.id, OWN), specs=(one,)), "text")


def test_every_rule_has_a_page_under_the_headings_of_the_site() -> None:
    from kbitcheck.core.rule import rules

    listed = pages.index(list(rules().values()))
    for code, rule in rules().items():
        assert f"  {code}  " in listed
        text = pages.page(rule)
        assert text.startswith(f"{code} {rule.name} ({rule.level.value}, ")
        assert rule.requirement.split()[0] in text
        headings = re.findall(r"^([A-Z][a-z]+(?: [a-z]+)*)\n  ", text, re.MULTILINE)
        assert headings == ["Why", "You will see", "What to do", "What fails", "Sources", "Run it"], code
        assert re.search(
            rf'^      @(breaks|wraps|spoils|trains|saves|merges|composes)\("{code}"', text, re.MULTILINE
        ), code
        assert "``" not in text.partition("What fails")[0]


def test_a_report_prints_as_on_the_command_line() -> None:
    found = report(failed("KB201", CASE, OWN))
    assert str(found) == render(found, "text")
    assert "KB201" in str(found)


def test_the_loss_after_a_step_stands_beside_what_the_gradient_says() -> None:
    losses = {"losses": [6.25, 6.0, 5.5], "predicted_changes": [0.0, -0.25, -0.8]}
    told = "trained     one step: loss 6.25 to 5.5 (5.45 by the gradient alone)"
    for facts in ({"forecast": FORECAST, **losses}, losses):
        found = report(specs=(spec(),), subject={"command": "model"}, facts={"cases": {spec().id: facts}})
        assert told in render(found, "text").splitlines()


def of_a_cut(cut: str, facts: dict[str, Any]) -> Report:
    results = (
        failed("KB201", CASE, OWN),
        dataclasses.replace(failed("KB210", CASE, OWN), cut=cut, seconds=3.0),
        Result(rule="KB307", case=CASE, level=Level.MUST, status=Status.PASS, examined=2, cut=cut, seconds=4.0),
    )
    return report(*results, facts={"cases": {CASE: {"cut": facts}}})


def test_a_report_says_which_rules_looked_at_a_cut() -> None:
    made = of_a_cut("2 of 30 blocks", {"blocks": "2 of 30 blocks", "towers": [], "reason": ""})
    text = " ".join(render(made, "text", verbose=True).split())
    assert "KB210 runs-everywhere (MUST, on a cut: 2 of 30 blocks)" in text
    assert "KB201 norms-fp32 (MUST) " in text
    assert "KB307 dropout-replayed: 2 examined (on a cut: 2 of 30 blocks)" in text
    assert "cut KB210, KB307 looked at 2 of 30 blocks, with the model's own weights, all other rules at" in text
    assert "Cut: KB210, KB307 looked at 2 of 30 blocks" in render(made, "html")
    assert "(MUST, on a cut: 2 of 30 blocks, attributed to peft)" in render(made, "markdown")
    assert [r.get("cut") for r in json.loads(render(made, "json"))["results"]] == [None, *["2 of 30 blocks"] * 2]


def test_a_report_says_why_there_is_no_cut_and_what_that_cost() -> None:
    made = of_a_cut(
        "the whole model", {"blocks": "", "towers": [], "reason": "model.layers runs a block several times"}
    )
    text = " ".join(render(made, "text", verbose=True).split())
    assert "on a cut" not in text
    reason = (
        "cut none (model.layers runs a block several times), so that KB210, KB307 looked at the whole model, for 7 s"
    )
    assert reason in text


def test_a_report_of_small_models_has_no_word_of_cuts() -> None:
    assert "cut" not in render(report(failed("KB210", CASE, OWN), facts={"cases": {CASE: {}}}), "text")


@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_what_a_rule_remarks_is_in_every_format_for_people_once(form: str) -> None:
    passed = [
        Result(rule="KB309", case=case, level=Level.MUST, status=Status.PASS, notes=("it is so",))
        for case in (CASE, "b")
    ]
    assert render(report(*passed), form).count("it is so") == 1
