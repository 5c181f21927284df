"""The first screen of the HTML report and its map of what fits: numbers, words, and the script that changes devices."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.memory_sizes import GIB, GPUS
from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Status
from kbitcheck.report import html
from kbitcheck.report.parts.basis import basis
from kbitcheck.report.parts.decisive import numbers
from kbitcheck.report.parts.fit_map import maps
from tests import chromium
from tests.ledger.reports import report, result

SCHEMA = json.loads(Path(html.__file__).with_name("schemas").joinpath("report.schema.json").read_text())
CASE = "tiny:llama-nf4-off"
ANSWER = {
    "memory": 24 * GIB, "fits": True, "batch": 3, "seq_len": 2048, "requested": 12 * GIB, "needed": 20 * GIB, "short": 0,
    "longest": 7440, "change": None, "least": None,
}  # fmt: skip
CHANGE = {"options": ["--batch 1"], "batch": 1, "seq_len": 2048, "needed": 20 * GIB}
CELLS = [
    {"batch": b, "seq_len": n, "needed": b * n * GIB // 256, "short": 5 if b * n == 4096 else 0}
    for b in (1, 2, 4)
    for n in (1024, 2048, 4096)
    if b * n < 16384
]
FORECAST: dict[str, Any] = {
    "groups": {}, "profile": "peft", "adapters": GIB, "optimizer": {"adamw": GIB}, "device": "cuda", "mode": "reentrant",
    "memory": 24 * GIB, "batch": 1, "seq_len": 2048, "limit": 8192, "activations": {}, "logits": 0, "autocast": "bf16",
    "chosen": "adamw", "answer": ANSWER, "cells": CELLS, "gpus": 1, "total": {"reentrant": 11 * GIB}, "overhead": GIB // 2,
    "missing": "", "loaded": 4 * GIB, "upcast": GIB, "resident": 7 * GIB, "notes": [], "longest": {}, "rooms": {},
}  # fmt: skip
ERRORS = {"layers": ["h.0.q", "h.1.q"], "error": [0.01, 0.03], "bound": [0.04, 0.04]}
TRAINED = {
    "bytes_loaded": 100, "bytes_prepared": 150, "gradient_errors": ERRORS, "adapters": 8, "dead_adapters": 1,
    "losses": [8.1, 7.0], "predicted_changes": [0.0, -1.0], "activations": 900, "checkpointed": 300, "batch": [2, 24],
}  # fmt: skip


def audited(*facts: dict[str, Any], command: str = "model", results: tuple[Any, ...] = (), **options: Any) -> Report:
    specs = [
        CaseSpec(model=f"tiny:llama{n or ''}", quant="nf4", implementation="peft", checkpointing="off", **options)
        for n, _ in enumerate(facts)
    ]
    subject = {
        "command": command, "implementation": {"name": "peft"}, "in_process": False,
        "cases": {spec.id: spec.as_json() for spec in specs},
    }  # fmt: skip
    cases = {spec.id: each for spec, each in zip(specs, facts, strict=True)}
    judged = results or (result("KB304", specs[0].id),)
    return dataclasses.replace(report(subject=subject, facts={"cases": cases}), results=judged)


def values(shown: Report) -> list[tuple[str, str, str]]:
    return [(number.title, number.state, number.value) for number in numbers(shown)]


def test_three_numbers_decide() -> None:
    shown = audited({**TRAINED, "forecast": FORECAST})
    assert values(shown) == [
        ("Fits", "good", "12 GiB of 24 GiB"), ("Costs", "plain", "11 GiB"), ("Trains", "good", "0.75 of the bound"),
    ]  # fmt: skip
    fits, costs, trains = (number.details for number in numbers(shown))
    assert fits == ("1 × 2,048 tokens with reentrant checkpointing", "at most 3 × 2,048, or 1 × 7,440")
    assert costs[0].endswith("predicted for cuda; beside it about 512 MiB of the CUDA context")
    assert costs[1] == "preparing adds 50 B (50%)"
    assert trains[1:] == ("7 of 8 adapter tensors learn", "a step's loss falls from 8.1 to 7")


def test_what_does_not_fit_says_by_how_much_and_what_does() -> None:
    small = {**ANSWER, "memory": 8 * GIB, "fits": False, "change": CHANGE}
    (fits, _, _) = numbers(audited({"forecast": FORECAST}, {"forecast": {**FORECAST, "answer": small}}))
    assert (fits.state, fits.mark, fits.value) == ("bad", "✗", "4 GiB too much for 8 GiB")
    assert fits.details[1] == "instead --batch 1: 1 × 2,048 tokens need 20 GiB, which fits"
    assert fits.details[2] == "worst of 2 cases: tiny:llama1-nf4-off"
    nothing = {**small, "change": None}
    assert (
        numbers(audited({"forecast": {**FORECAST, "answer": nothing}}))[0].details[1] == "nothing that was tried fits"
    )
    holes = {**ANSWER, "short": 5}
    assert numbers(audited({"forecast": {**FORECAST, "answer": holes}}))[0].state == "warn"


def test_a_number_that_is_not_there_says_how_to_get_it() -> None:
    (fits, costs, trains) = numbers(audited(TRAINED))
    assert (fits.state, fits.details) == ("unknown", ("`--memory 24GiB`, or a GPU's name, forecasts it",))
    assert (costs.value, costs.details[0], costs.details[2]) == (
        "150 B", "weights, prepared", "a step of 2 × 24 tokens holds 300 B",
    )  # fmt: skip
    assert trains.state == "good"
    assert numbers(audited(TRAINED, command="impl"))[0].details[0].startswith("`kbitcheck model MODEL --memory")
    missing = {**FORECAST, "answer": None, "missing": "no layer is quantized"}
    assert numbers(audited({"forecast": missing}))[0].details == ("no step was predicted: no layer is quantized",)
    assert numbers(audited({}, command="adapter")) == []


def test_a_rule_that_counts_makes_its_number_bad() -> None:
    broken = (result("KB304", CASE, Status.FAIL), result("KB403", CASE, Status.FAIL), result("KB301", CASE))
    states = {number.title: (number.state, number.details[0]) for number in numbers(audited(TRAINED, results=broken))}
    assert states["Costs"] == ("bad", "broken: KB403")
    assert states["Trains"] == ("bad", "broken: KB304")
    mild = (result("KB304", CASE, Status.FAIL, level=Level.SHOULD),)
    assert values(audited(TRAINED, results=mild))[2][1] == "good"


def test_gradients_that_were_not_judged_are_no_good_number() -> None:
    skipped = result("KB304", CASE, Status.SKIP, reason="needs a run")
    (_, costs, trains) = numbers(audited({}, results=(skipped,)))
    assert (trains.state, trains.value, trains.details) == ("unknown", "not judged", ("gradients: needs a run",))
    assert costs.state == "unknown"
    assert values(audited({}, results=(result("KB301", CASE),)))[2] == (
        "Trains", "good", "1 rule on training steps kept",
    )  # fmt: skip


def test_what_a_verdict_rests_on() -> None:
    lines = basis(audited({**TRAINED, "forecast": {**FORECAST, "activations": {"off": {}}}, "static": "so"}))
    assert lines[1:] == [
        "gradients of 2 layers beside float64 twins",
        "memory by steps predicted for cuda",
        "no weights were read and no step was run",
    ]
    assert lines[0] == "1 rule judged in 1 case, 3 observations"


def test_the_first_screen_stands_above_everything() -> None:
    page = html.render(audited({**TRAINED, "forecast": FORECAST}))
    places = [page.index(part) for part in ("<h1", "Rests on: ", '<ul class="deciding">', "<nav", "<h2 id=")]
    assert places == sorted(places)
    order = re.findall('<h2 id="([a-z-]+)"', page)
    assert order[:2] == ["broken-rules", "map"]


def test_the_map_has_a_cell_for_each_step_that_was_predicted() -> None:
    (found,) = maps(audited({"forecast": FORECAST}, gpu="RTX 3090"))
    assert (found.device, found.lengths, list(found.rows)) == ("RTX 3090 24 GiB", (1024, 2048, 4096), [1, 2, 4])
    fits = {batch: [cell.fit for cell in cells] for batch, cells in found.rows.items()}
    assert fits == {1: ["fits", "fits", "tight"], 2: ["fits", "tight", "over"], 4: ["tight", "over", "none"]}
    assert 24 * GIB not in found.others
    assert len(found.others) == len(GPUS) - 1
    (on_cpu,) = maps(audited({"forecast": {**FORECAST, "device": "cpu"}}))
    assert on_cpu.others == {}


@pytest.mark.parametrize(("command", "advice"), [("model", True), ("impl", False)])
def test_a_report_without_a_map_says_which_option_gives_one(command: str, *, advice: bool) -> None:
    page = html.render(audited(TRAINED, command=command))
    assert ("<code>--memory T4</code>" in page) == advice
    assert ('<h2 id="map">' in page) == advice
    assert '<div class="map"' not in page


def test_the_schema_knows_cells() -> None:
    data = json.loads(json.dumps(audited({"forecast": {**FORECAST, "curve": None}}).as_json()))
    jsonschema.validate(data, SCHEMA)
    data["facts"]["cases"][CASE]["forecast"]["cells"][0]["needed"] = -1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


@chromium.NEEDED
def test_another_device_is_an_estimate_and_drawn_as_one(tmp_path: Path) -> None:
    script = """
      const map = document.querySelector(".map"), select = map.querySelector("select");
      const of = (cell) => cell.querySelector(".mark").textContent + cell.className.split(" ").sort().join(" ");
      const see = () => [[...map.querySelectorAll("td")].map(of).join(),
        map.querySelector("[role=status]").textContent.split(" ", 2).join(" ")];
      const first = see();
      select.value = String(16 * 2 ** 30);
      select.dispatchEvent(new Event("change"));
      const second = see();
      select.selectedIndex = 0;
      select.dispatchEvent(new Event("change"));
      return [map.querySelector("form").hidden, first, second, see()];"""
    shown = audited({"forecast": FORECAST})
    ((hidden, first, second, again),) = chromium.framed([html.render(shown)], tmp_path, script)
    assert not hidden
    cells = "✓fits,✓fits requested,!tight,✓fits,!tight,✗over,!tight,✗over,?none"
    assert first == again == [cells, "Confirmed for"]
    fits, over = "≈ ✓estimate fits", "≈ ✗estimate over"
    assert second == [",".join([fits, f"{fits} requested", fits, fits, fits, over, fits, over, "?none"]), "An estimate"]
