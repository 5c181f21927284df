"""The ledger as a file: what is written, what is kept, and what is wrong with a bad one."""

from __future__ import annotations

import dataclasses
from datetime import date

import pytest

from kbitcheck.compare.accept import accept
from kbitcheck.compare.gate import judge
from kbitcheck.compare.ledger import Ledger
from kbitcheck.core.errors import UsageError
from kbitcheck.core.result import Party, Status
from tests.ledger.reports import CODES, INT8, NF4, SPECS, STACK, report, result

FAIL, SKIP = Status.FAIL, Status.SKIP
SOME = report(
    result("KB505", NF4, FAIL),
    result("KB505", INT8, FAIL),
    result("KB201", INT8, FAIL, STACK),
    result("KB101", NF4, SKIP),
)


def test_a_ledger_says_what_was_judged_skipped_and_accepted() -> None:
    text = accept(SOME)
    ledger = Ledger.parse(text)
    assert ledger.implementation == "fork:prepare"
    assert ledger.environment["torch"] == "2.13.0"
    assert (ledger.rules, ledger.cases) == (CODES, (INT8, NF4))
    assert ledger.skipped == {NF4: ("KB101",)}
    assert [(e.rule, e.status, e.attributed_to, e.cases, e.reason) for e in ledger.accepted] == [
        ("KB201", FAIL, Party.STACK, (INT8,), ""),
        ("KB505", FAIL, Party.IMPLEMENTATION, (INT8, NF4), ""),
    ]
    assert text.splitlines()[ledger.accepted[1].line - 1] == "[[accepted]]"
    assert text.endswith("]\n")
    assert "\n\n\n" not in text
    assert "]\n[" not in text


def test_a_rule_that_no_case_could_judge_is_not_listed() -> None:
    """As one on a training script's own steps. It is new when it fails."""
    nowhere = [result("KB711", case, SKIP) for case in (INT8, NF4)]
    text = accept(report(*nowhere, result("KB101", NF4, SKIP)))
    ledger = Ledger.parse(text)
    assert (ledger.rules, ledger.skipped) == (CODES, {NF4: ("KB101",)})
    judged = judge(report(*nowhere), ledger)
    assert judged.gate is not None
    assert (judged.gate["notes"], judged.gate["breaches"]) == ([], [])
    assert judge(report(result("KB711", NF4, FAIL)), ledger).exit_code == 1


def test_rules_about_compositions_are_judged_on_these_alone() -> None:
    """As the full suite does, whose models are no compositions."""
    specs = [*SPECS, dataclasses.replace(SPECS[0], composition="copy")]
    whole = report(result("KB705", specs[2].id), subject={"cases": {spec.id: spec.as_json() for spec in specs}})
    ledger = Ledger.parse(accept(whole))
    assert ledger.expected.keys() == {(r.rule, r.case) for r in whole.results}
    gated = judge(whole, ledger)
    assert (gated.exit_code, gated.gate and gated.gate["breaches"]) == (0, [])
    with pytest.raises(UsageError, match="the run is not complete"):
        accept(dataclasses.replace(whole, results=whole.results[1:]))


def test_accepting_the_same_again_changes_nothing() -> None:
    text = accept(SOME)
    assert accept(SOME, text) == text
    shuffled = dataclasses.replace(SOME, results=tuple(reversed(SOME.results)))
    assert accept(shuffled) == text


WRITTEN = """\
# Ours. Ask the maintainers.
schema = 1
implementation = "fork:prepare"

[environment]
python = "3.11.7" # the oldest we support
torch = "2.13.0"
transformers = ""
bitsandbytes = ""
peft = ""
device = "cpu"

[judged]
rules = ["KB101", "KB201", "KB505"]
cases = [
    "tiny:llama-int8-off", # slow
    "tiny:llama-nf4-off",
]

# Gone when we drop transformers 4.
[[accepted]]
rule = "KB201"
status = "FAIL"
attributed_to = "implementation"
reason = "half on purpose"
cases = ["tiny:llama-nf4-off"]

# Upstream's.
[[accepted]]
rule = "KB505"
status = "FAIL"
attributed_to = "implementation"
reason = "two hooks" # see the issue
issue = "https://example.org/1"
expires = 2030-01-31
cases = [
    "tiny:llama-int8-off",
    "tiny:llama-nf4-off", # as well
]
"""


def test_what_people_wrote_is_kept() -> None:
    both = report(result("KB201", NF4, FAIL), result("KB505", NF4, FAIL), result("KB505", INT8, FAIL))
    assert accept(both, WRITTEN) == WRITTEN
    fixed = report(result("KB505", NF4, FAIL), result("KB101", NF4, FAIL))
    text = accept(fixed, WRITTEN)
    assert "half on purpose" not in text
    assert "drop transformers 4" not in text
    for kept in ("# Ours.", "# the oldest", "# slow", "# Upstream's.\n[[accepted]]", "# see the issue", "# as well"):
        assert kept in text
    new, old = Ledger.parse(text).accepted
    assert (new.rule, new.reason, new.cases) == ("KB101", "", (NF4,))
    assert (old.reason, old.issue, old.expires, old.cases) == (
        "two hooks",
        "https://example.org/1",
        date(2030, 1, 31),
        (NF4,),
    )


def test_a_case_that_stands_twice_goes_twice() -> None:
    one = report(result("KB505", NF4, FAIL))
    head, _, _ = accept(one).rpartition("cases = ")
    text = accept(one, f'{head}cases = ["{INT8}", "{NF4}", "{INT8}"]\n')
    assert [entry.cases for entry in Ledger.parse(text).accepted] == [(NF4,)]


def test_a_new_case_of_an_explained_rule_is_not_explained_with_it() -> None:
    one = accept(report(result("KB505", NF4, FAIL))).replace('reason = ""', 'reason = "two hooks"')
    ledger = Ledger.parse(accept(report(result("KB505", NF4, FAIL), result("KB505", INT8, FAIL)), one))
    assert [(e.cases, e.reason) for e in ledger.accepted] == [((INT8,), ""), ((NF4,), "two hooks")]


def test_a_committed_finding_brings_its_reason_and_an_error_does_not() -> None:
    found = report(result("KB505", NF4, FAIL, finding="so"), result("KB201", NF4, Status.ERROR, reason="it broke"))
    assert [e.reason for e in Ledger.parse(accept(found)).accepted] == ["", "so"]


@pytest.mark.parametrize(
    "bad",
    [
        report(complete=False),
        report(drop=(("KB505", NF4),)),
        report(*(result(c, case, SKIP) for c in CODES for case in (INT8, NF4))),
    ],
    ids=["interrupted", "a cell is missing", "nothing was checked"],
)
def test_half_a_run_writes_no_ledger(bad) -> None:
    with pytest.raises(UsageError, match="is not written"):
        accept(bad)


HEAD = "schema = 1\n"
ENTRY = HEAD + '[[accepted]]\nrule = "KB505"\nstatus = "FAIL"\ncases = ["a"]\n'
BAD = [
    ("", "l.toml:1: not a kbitcheck ledger"),
    ("schema = 2", "l.toml:1: not a kbitcheck ledger of schema 1"),
    (HEAD + "a = [1,\nb", "l.toml:3: not TOML"),
    (HEAD + "a = 'x", "l.toml:2: not TOML"),
    (HEAD + "\nmine = 1", "l.toml:3: unknown key 'mine'"),
    (HEAD + "judged = 3", "l.toml:2: judged must be a table"),
    (HEAD + "[judged]\nrules = [1]", "l.toml:3: must be a list of strings"),
    (HEAD + "accepted = 3", "l.toml:2: accepted must be tables"),
    (ENTRY + "who = 1", "l.toml:2: unknown field 'who'"),
    (ENTRY.replace("KB505", "505"), "l.toml:2: rule must be a code"),
    (ENTRY.replace("FAIL", "PASS"), "l.toml:2: status must be FAIL or ERROR"),
    (ENTRY.replace('["a"]', "[]"), "l.toml:2: an entry needs its cases"),
    (ENTRY.replace('["a"]', '"a"'), "l.toml:2: must be a list of strings"),
    (ENTRY + "attributed_to = 'mine'", "l.toml:2: attributed_to must be"),
    (ENTRY + "reason = 1", "l.toml:2: must be a string"),
    (ENTRY + "expires = 'soon'", "l.toml:2: expires must be a date"),
    (ENTRY + "expires = 2030-01-01T00:00:00", "l.toml:2: expires must be a date"),
    (ENTRY + ENTRY.removeprefix(HEAD), "l.toml:6: KB505 on a stands in line 2 already"),
]


@pytest.mark.parametrize(("text", "told"), BAD, ids=range(len(BAD)))
def test_a_bad_ledger_is_told_in_one_line_with_its_position(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Ledger.parse(text, name="l.toml")
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_a_date_may_be_quoted() -> None:
    assert Ledger.parse(ENTRY + "expires = '2030-01-31'").accepted[0].expires == date(2030, 1, 31)


def test_there_may_be_no_such_file(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no ledger .*--accept` makes it"):
        Ledger.read(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read the ledger"):
        Ledger.read(tmp_path / "binary.toml")
