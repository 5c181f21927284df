"""The table of quantization methods says what transformers and PEFT really do with each."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from kbitcheck_reference import prepare_model_for_kbit_training as reference
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from kbitcheck.cli.app import run_command
from kbitcheck.cli.commands import backends as command
from kbitcheck.core.methods import Method, Methods
from kbitcheck.models.methods import described, loading
from kbitcheck.observe.probes.treatment import peft_function, treatment
from kbitcheck.report.tables.methods import render
from kbitcheck.run.methods import FULL, NAMED, ON_LOAD, methods

# By PEFT's function, `utils/other.py`: the names that it looks for beside the marks of 4 and 8 bits.
NAMED_BY_PEFT = {"gptq", "aqlm", "eetq", "hqq", "torchao"}
PAGE = Path(__file__).parents[2] / "docs" / "backends.md"


@pytest.fixture(scope="module")
def table() -> Methods:
    return methods()


def row(table: Methods, method: str) -> Method:
    return next(row for row in table.rows if row.loading.method == method)


def test_every_method_that_transformers_lists_has_a_row(table: Methods) -> None:
    assert len(table.rows) == len(AUTO_QUANTIZER_MAPPING)
    assert {row.loading.method for row in table.rows} == AUTO_QUANTIZER_MAPPING.keys()
    assert all(row.loading.trainable for row in table.rows)


def test_peft_casts_and_leaves_checkpointing_off_for_names_that_it_does_not_look_for(table: Methods) -> None:
    for each in table.rows:
        named, method = each.loading.method in NAMED_BY_PEFT, each.loading.method
        assert each.treatment is not None
        assert each.treatment.freezes, method
        assert each.treatment.casts is not named, method
        assert each.treatment.checkpoints is (named or each.audit == FULL), method


def test_the_reference_checkpoints_whatever_the_method() -> None:
    seen = {fields["quant_method"]: treatment(reference, fields) for fields in described().values()}
    assert {str(each) for each in seen.values()} == {"freezes, casts, checkpoints"}


def test_a_method_says_what_it_needs_here(table: Methods) -> None:
    assert "vptq" in row(table, "vptq").loading.refused
    assert row(table, "bitsandbytes_4bit").loading.summary == "yes"
    audits = [row(table, name).audit for name in ("vptq", "gptq", "bitsandbytes_4bit")]
    assert audits == [NAMED, "static", FULL]


@pytest.mark.transformers5("before it, its layers have no backward")
def test_what_runs_if_it_is_quantized_on_load_says_so(table: Methods) -> None:
    assert row(table, "fp8").audit == ON_LOAD
    assert "unpacks it on load" in row(table, "fp8").why


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is unpacked hangs on the GPU")
def test_weights_that_are_unpacked_on_load_are_told_of(table: Methods) -> None:
    assert row(table, "mxfp4").loading.unpacked
    assert not row(table, "bitsandbytes_4bit").loading.unpacked


@pytest.mark.transformers5("before it, no setting of a method decides but torchao's")
def test_whether_a_method_trains_hangs_on_its_settings() -> None:
    fields = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    assert loading(fields).trainable == "yes"
    assert loading({**fields, "quantization_mode": "offline"}).trainable == "no"
    assert loading({"quant_method": "bitnet"}).trainable == "depends on linear_class"


def test_a_method_of_nobody_is_refused() -> None:
    assert loading({"quant_method": "septet"}).refused == "transformers does not know this method"


def test_a_preparation_that_does_nothing_is_seen() -> None:
    nothing: Callable[..., Any] = lambda model: model  # noqa: E731
    assert str(treatment(nothing, {"quant_method": "gptq"})) == "changes nothing; leaves checkpointing off"


def test_the_published_table_is_that_of_its_versions(table: Methods) -> None:
    page = PAGE.read_text("utf-8")
    stated = [f"transformers {transformers.__version__}", f"peft {table.versions['peft']}"]
    if not all(version in page for version in stated):
        pytest.skip("the page is of other versions")

    def cells(markdown: str) -> list[list[str]]:
        return [line.split(" | ")[:3] for line in markdown.splitlines() if line.startswith("| `")]

    assert cells(page) == cells(render(table, "markdown"))


def test_the_command_renders_each_format(
    table: Methods, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "methods", lambda: table)
    assert run_command("backends", ["--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["methods"]) == len(table.rows)
    assert printed["methods"][0]["peft"]["freezes"] is True
    assert run_command("backends", []) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[0] == "method"


def test_without_peft_the_column_says_so(monkeypatch: pytest.MonkeyPatch, table: Methods) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert peft_function() is None
    alone = Method(loading=table.rows[0].loading, treatment=None, audit=NAMED)
    assert "PEFT is not installed" in render(Methods(versions={}, rows=(alone,)), "text")
