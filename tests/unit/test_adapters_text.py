"""The text forms of adapters: a name, a file, JSON, or a configuration object of PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig

from kbitcheck.core.adapters import NAMED, as_text, fields
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError
from kbitcheck.observe.configured import configuration


def test_a_name_is_read_in_any_case() -> None:
    assert as_text("peft:dora") == "peft:DoRA"
    assert fields("peft:DoRA") == {"peft_type": "LORA", "use_dora": True}
    assert fields("peft") is None
    assert fields("reference") is None


def test_the_text_of_a_text_is_that_text() -> None:
    for text in ("reference", "peft", "peft:VeRA", 'peft:{"peft_type": "IA3"}'):
        assert as_text(as_text(text)) == text


def test_a_saved_configuration_is_read_without_where_it_was_used(tmp_path: Path) -> None:
    LoraConfig(r=3, use_dora=True, base_model_name_or_path="some/model", inference_mode=True).save_pretrained(
        str(tmp_path)
    )
    read = fields(as_text(str(tmp_path / "adapter_config.json")))
    assert read is not None
    assert read["use_dora"] is True
    assert not {"base_model_name_or_path", "inference_mode", "peft_version"} & read.keys()
    assert configuration(read, ["q"], 8).r == 3


def test_an_object_is_its_fields_that_are_no_defaults() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], lora_dropout=0.5)
    expected = {"peft_type": "LORA", "r": 2, "target_modules": ["k_proj", "q_proj"], "lora_dropout": 0.5}
    assert fields(as_text(config)) == expected
    spec = CaseSpec(model="m", quant="nf4", implementation="i", adapters=IA3Config())  # type: ignore[arg-type]
    assert json.loads(spec.adapters.removeprefix("peft:")) == {"peft_type": "IA3"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("peft:DORRA", r"did you mean dora\?"),
        ("refrence", r"did you mean reference\?"),
        ("DORA", r"did you mean peft:DoRA\?"),
        ("elsewhere", r"no such --adapters: 'elsewhere'; use reference"),
        ("nowhere.json", "cannot read"),
        ("peft:{}", "peft_type"),
        ("{", "is no JSON"),
        ('{"peft_type": 3}', "peft_type"),
        (7, "not 7"),
    ],
)
def test_what_is_no_configuration_is_one_clear_line(wrong: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        as_text(wrong)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"r": 4}', encoding="utf-8")
    with pytest.raises(UsageError, match=r"config\.json is no configuration"):
        as_text(str(file))


@pytest.mark.parametrize(
    ("fields_", "message"),
    [
        ({"peft_type": "LORRA"}, r"no adapters of type 'LORRA' \(did you mean LORA\?\)"),
        ({"peft_type": "LORA", "use_dorra": True}, r"no field 'use_dorra' \(did you mean use_dora\?\)"),
        ({"peft_type": "LORA", "target_modules": ["q"], "layers_to_transform": [0], "bias": 1, "use_rslora": 1}, ""),
        ({"peft_type": "ADALORA"}, "refuses these adapters"),
    ],
)
def test_peft_has_the_type_and_its_fields(fields_: dict[str, object], message: str) -> None:
    if not message:
        assert configuration(fields_, ["q"], 4).layers_to_transform == [0]
        return
    with pytest.raises(UsageError, match=message):
        configuration(fields_, ["q"], 4)


def test_every_name_is_a_configuration_of_peft() -> None:
    for name, values in NAMED.items():
        if name == "LoftQ":  # it needs scipy
            continue
        config = configuration(values, ["layer"], 4)
        assert str(config.peft_type.value) == values["peft_type"], name
