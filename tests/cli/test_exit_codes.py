"""Every kind of input gets its exit code, one clear line, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kbitcheck.core.report import Report
from kbitcheck.core.result import Status
from tests.cli.conftest import Door

ONE = ("--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off")

TWO = ("--model", "tiny:llama", "--model", "tiny:gpt2", "--quant", "nf4", "--checkpointing", "off", "--timeout", "20")

RUNS = [
    (("good.py:prepare",), 0, "✓ conforms: 4 kept, 1 not applicable"),
    (("good:prepare",), 0, "✓ conforms"),
    (("rude.py:prepare",), 0, "1 warning"),
    (("rude.py:prepare", "--strict"), 1, "1 rule broken"),
    (("nothing.py:prepare",), 1, "✗ does not conform: 1 rule broken"),
    (("nothing.py:prepare", "--ignore", "KB103=known"), 0, "1 ignored"),
    (("half_judged.py:prepare",), 1, "✗ does not conform: 1 rule broken, 1 could not be judged, 2 kept"),
    (("half_judged.py:prepare", "--select", "KB101,KB201"), 3, "✗ could not be judged: 1 could not be judged, 1 kept"),
    (("deaf.py:prepare",), 0, "1 warning"),
    (("deaf.py:prepare", "--strict"), 1, "✗ does not conform: 1 rule broken, 3 kept"),
    (("nothing.py:prepare", "--select", "KB101,kb9"), 0, "2 kept"),
    (("good.py:prepare", "--select", "KB102"), 5, "nothing was checked"),
    (("good.py:prepare", "--quant", "int8"), 0, "1 warning"),
    (("reference", "--quant", "int8"), 1, "rule"),
    (("litters.py:prepare",), 0, "conforms"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "told"), RUNS, ids=lambda a: " ".join(a) if isinstance(a, tuple) else None
)
def test_a_run_ends_with_the_code_of_its_worst_result(
    door: Door, arguments: tuple[str, ...], code: int, told: str
) -> None:
    quant = () if "--quant" in arguments else ("--quant", "nf4")
    ran = door("impl", *arguments, "--model", "tiny:llama", *quant, "--checkpointing", "off")
    assert (ran.returncode, ran.stderr.count("\n")) == (code, 1), ran.stderr
    assert told in ran.stderr
    assert told in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr
    assert "chatter" not in ran.stdout + ran.stderr
    assert door.left() == []


BROKEN = [
    ("raises", "ValueError: no"),
    ("leaves", "exit code 7; it last printed: last words"),
    ("exits", "SystemExit: bye"),
    ("crashes", "killed by SIGSEGV"),
    ("garbles", "pipe was written to by the implementation"),
    ("forks", "exit code 5"),
]


@pytest.mark.parametrize(("subject", "cause"), BROKEN, ids=[s for s, _ in BROKEN])
def test_a_case_that_breaks_is_one_failure_with_its_cause_and_the_run_goes_on(
    door: Door, subject: str, cause: str
) -> None:
    ran = door("impl", f"{subject}.py:prepare", *TWO, "--format", "json")
    assert ran.returncode == 1, ran.stderr
    report = Report.from_json(json.loads(ran.stdout))
    assert report.complete
    assert [(r.case, r.rule) for r in report] == [
        (f"{model}-nf4-off", rule)
        for model in ("tiny:llama", "tiny:gpt2")
        for rule in ("KB101", "KB102", "KB103", "KB201", "KB901")
    ]
    status = {(r.case, r.rule): r for r in report}
    for model in ("tiny:llama", "tiny:gpt2"):
        assert status[f"{model}-nf4-off", "KB101"].status is Status.PASS
        assert status[f"{model}-nf4-off", "KB103"].status is Status.FAIL
        assert cause in status[f"{model}-nf4-off", "KB103"].failures[0].actual
    assert Status.ERROR not in {r.status for r in report}
    assert {r.reason.partition(":")[0] for r in report if r.rule == "KB901"} <= {
        "",
        "not judged, as KB103 in this case",
    }
    assert door.left() == []


@pytest.mark.parametrize(
    ("subject", "cause"),
    [("killed", "killed by SIGKILL (out of memory, or by itself)"), ("hungry", "MemoryError: not enough")],
)
def test_no_memory_is_an_error_for_it_may_be_the_machines(door: Door, subject: str, cause: str) -> None:
    ran = door("impl", f"{subject}.py:prepare", *TWO, "--format", "json")
    assert ran.returncode == 3, ran.stderr
    report = Report.from_json(json.loads(ran.stdout))
    of_calls = [r for r in report if r.rule == "KB103"]
    assert {r.status for r in of_calls} == {Status.ERROR}
    assert all(cause in r.reason for r in of_calls)


def test_a_hang_is_a_failure_where_the_reference_takes_a_tenth_of_the_time(door: Door) -> None:
    ran = door("impl", "hangs.py:prepare", *ONE, "--timeout", "6")
    assert ran.returncode == 1, ran.stdout
    assert "no result within 6 s, in prepare at" in ran.stdout


@pytest.mark.parametrize(
    ("subject", "cause"), [("import_dies", "exit code 3"), ("import_hangs", "no result within 6 s")]
)
def test_an_implementation_whose_import_ends_the_worker_is_tried_once(door: Door, subject: str, cause: str) -> None:
    ran = door("impl", f"{subject}.py:prepare", *ONE, "--model", "tiny:gpt2", "--timeout", "6", "--jobs", "1")
    assert ran.returncode == 1
    assert "could not be loaded" in ran.stdout
    assert cause in ran.stdout
    assert "In all 2 cases" in ran.stdout


WRONG = [
    (("impl", "import_error.py:prepare", *ONE), "No module named 'no_such_module_anywhere'"),
    (("impl", "not_callable.py:prepare", *ONE), "is a int, which cannot be called"),
    (("impl", "good.py:absent", *ONE), "no attribute 'absent'"),
    (("impl", "absent.py:prepare", *ONE), "no such file: absent.py"),
    (("impl", "absent_module:prepare", *ONE), "no module named 'absent_module'"),
    (("impl", "good.py", *ONE), "names no function"),
    (("impl", "good.py:1x", *ONE), "names no function"),
    (("impl", "pet", *ONE), "names no function (did you mean peft?)"),
    (("impl", "!:f", *ONE), "is not one of"),
    (("impl", "good.py:prepare", "--model", "tiny:nope"), "no such model"),
    (("impl", "good.py:prepare", "--model", "late"), "the weights are truncated"),
    (("impl", "good.py:prepare", "--select", "KB7"), "no rule matches 'KB7'"),
    (("impl", "good.py:prepare", "--ignore", "KB101"), "wants CODE=REASON"),
    (("impl", "good.py:prepare", "--ignore", "KB777=because"), "no rule matches 'KB777'"),
    (("impl", "good.py:prepare", "--checkpointing", "maybe"), "no such --checkpointing: 'maybe'"),
    (("impl", "good.py:prepare", "--profile", "maybe"), "--profile"),
    (("impl", "good.py:prepare", "--timeout", "0"), "--timeout"),
    (("impl", "good.py:prepare", "--timeout", "nan"), "--timeout"),
    (("impl", "good.py:prepare", "--rank", "0"), "--rank"),
    (("impl", "good.py:prepare", "--device", "toaster"), "no such device: 'toaster'"),
    (("impl", "good.py:prepare", "--device", "cuda"), "no such device here: 'cuda'"),
    (("impl", "good.py:prepare", "--format", "yaml"), "use text, json, junit, sarif, markdown, html"),
    (("impl", "good.py:prepare", "--format", "xml"), "no such --format: 'xml'"),
    (("impl", "good.py:prepare", "--output", "absent/report.txt"), "cannot write --output absent/report.txt"),
    (("impl", "good.py:prepare", "--output", "."), "it is a directory"),
    (("impl", "good.py:prepare", "--fuzz", "3", "--in-process"), "cannot run --in-process"),
    (("impl", "good.py:prepare", "--nonsense"), "No such option"),
    (("impl",), "which implementation? write kbitcheck impl IMPL"),
    (("model", "tiny:llama", "--static", "--random-weights"), "leave out --random-weights"),
    (("model", "tiny:llama", "--memory", "lots"), "such as 24GiB"),
    (("model", "tiny:llama", "--memory", "0"), "such as 24GiB"),
    (("model", "tiny:llama", "--memory", "24XB"), "such as 24GiB"),
    (("model", "tiny:nope"), "no such model"),
    (("gate", "peft", "--ledger", "x"), "no ledger x"),
    (("rules", "KB7"), "no rule matches"),
    (("selftest", "--select", "KB7"), "no rule matches"),
    (("selftest", "--matrix", "/dev/null"), "--matrix /dev/null: File exists"),
    (("show", "absent.json"), "cannot read absent.json"),
    (("show", "good.py"), "is not a kbitcheck report"),
    (("dance",), "No such command"),
    (("imple", "good.py:prepare"), "(did you mean impl?)"),
    (("impl", "good.py:prepare", "--modle", "tiny:llama"), "No such option: --modle (did you mean --model?)"),
    (("impl", "good.py:prepare", "--profile", "pef"), "no such --profile: 'pef' (did you mean peft?)"),
    (("impl", "good.py:prepare", "and.py:another"), "unexpected argument: and.py:another"),
    (("rules", "KB1O1"), "no rule matches 'KB1O1' (did you mean KB101?)"),
    (("rules", "alwys-kept"), "no rule matches 'alwys-kept' (did you mean KB101 always-kept?)"),
    (("matrix", "--prepare", "trl"), "write the implementation without an option, as in kbitcheck matrix peft"),
    (("--hlep",), "No such option: --hlep (did you mean --help?)"),
    (("impl", "good.py:prepare", "--quant", "nf5"), "unknown quantization 'nf5' in 'nf5' (did you mean nf4?); known: "),
    (("impl", "good.py:prepar", *ONE), "good.py has no attribute 'prepar' (did you mean prepare?)"),
    (("impl", "goood:prepare", *ONE), "no module named 'goood' is installed or in this directory (did you mean good?)"),
    (("impl", "json.decodr:prepare", *ONE), "no module named 'json.decodr' (did you mean decoder?)\n"),
    (("impl", "json.zebra.x:prepare", *ONE), "no module named 'json.zebra'\n"),
]


@pytest.mark.parametrize(("arguments", "told"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_usage_is_one_line_and_4(door: Door, arguments: tuple[str, ...], told: str) -> None:
    ran = door(*arguments)
    assert (ran.returncode, ran.stdout) == (4, ""), ran.stderr
    assert ran.stderr.startswith("kbitcheck: ")
    assert ran.stderr.count("\n") == 1
    assert told in ran.stderr
    assert door.left() == []


def test_debug_shows_the_traceback_and_what_the_worker_prints(door: Door) -> None:
    wrong = door("impl", "import_error.py:prepare", *ONE, "--debug")
    assert wrong.returncode == 4
    assert "Traceback" in wrong.stderr
    chatty = door("impl", "nothing.py:prepare", *ONE, "--debug")
    assert "chatter" in chatty.stderr
    assert "chatter" not in chatty.stdout


def test_without_arguments_it_helps_and_says_4(door: Door) -> None:
    ran = door()
    assert ran.returncode == 4
    assert "Commands:" in ran.stdout


def test_output_is_written_whole_and_in_place(door: Door, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    ran = door("impl", "good.py:prepare", *ONE, "--format", "json", "--output", str(link))
    assert (ran.returncode, ran.stdout) == (0, "")
    assert link.is_symlink()
    assert json.loads(target.read_text())["exit_code"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "link.json", "report.json", "scratch"]
    shown = door("show", str(target), "-v")
    assert shown.returncode == 0
    assert "KB102 not-applicable: there is nothing" in shown.stdout


def test_text_in_a_file_whose_name_promises_html_is_told(door: Door) -> None:
    for name, promise in (("r.html", "r.html holds text: for html pass --format html"), ("r.txt", "")):
        ran = door("impl", "good.py:prepare", *ONE, "--output", name)
        assert promise in ran.stderr
        assert ("holds text" in ran.stderr) is bool(promise)
    assert "holds text" not in door("impl", "good.py:prepare", *ONE, "--output", "r.html", "--format", "html").stderr


def test_a_device_file_as_output_stays_a_device_file(door: Door) -> None:
    ran = door("impl", "good.py:prepare", *ONE, "--output", "/dev/null")
    assert ran.returncode == 0
    assert Path("/dev/null").is_char_device()
    full = door("impl", "good.py:prepare", *ONE, "--output", "/dev/full")
    assert full.returncode == 4
    assert "No space left" in full.stderr


def test_model_counts_the_stacks_failures_too(door: Door) -> None:
    ran = door("model", "tiny:llama", "--prepare", "rude.py:prepare", "--quant", "int8")
    assert ran.returncode == 1
    assert "✗ KB901 stack-works  (MUST)" in ran.stdout
    assert "model.layers.{0..11}.mlp" in ran.stdout
    assert "attributed to the stack: a bare layer" in ran.stdout
    assert (
        "Again: kbitcheck model tiny:llama --prepare rude.py:prepare --quant int8 --profile auto --select KB901"
        in ran.stdout
    )
    assert "weights     1.95 KiB → 2.86 MiB after preparing" in ran.stdout
    again = door(*ran.stdout.partition("Again: kbitcheck ")[2].splitlines()[0].split())
    assert again.returncode == 1


def test_an_empty_option_of_model_is_as_one_not_given(door: Door) -> None:
    given = ("--prepare", "good.py:prepare", "--dtype", "", "--revision", "", "--format", "json")
    [case] = json.loads(door("model", "tiny:llama", *given).stdout)["subject"]["cases"].values()
    assert [case[name] for name in ("dtype", "revision", "random_weights")] == [None, None, False]


def test_in_process_runs_the_same_cases_and_says_so(door: Door) -> None:
    ran = door("impl", "nothing.py:prepare", *ONE, "--in-process")
    assert ran.returncode == 1
    assert "in this process" in " ".join(ran.stdout.split())
    assert ("chatter" in ran.stderr, "chatter" in ran.stdout) == (True, False)
    broken = door("impl", "exits.py:prepare", *ONE, "--in-process")
    assert broken.returncode == 1
    assert "SystemExit: bye" in broken.stdout


def test_selftest_tells_what_was_missed(door: Door) -> None:
    assert door("selftest", "--select", "KB1").returncode == 0
    missed = door("selftest", "--select", "KB1,KB9")
    assert missed.returncode == 1
    assert "MISSED  KB901" in missed.stdout
    assert "2 of 3 faults caught" in missed.stderr
    assert "not run  KB102" in missed.stdout
    died = door("selftest", "--select", "KB201")
    assert died.returncode == 3
    assert "exit code 9" in died.stderr
