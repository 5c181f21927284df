from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError

NAMES = st.lists(st.from_regex(r"[a-z_][a-z_.0-9]{0,9}", fullmatch=True), max_size=3, unique=True).map(tuple)
FOUR_BIT = st.builds(
    lambda scheme, skip, **values: Quantization.of(registry.schemes()[scheme], values, skip),
    scheme=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    compute=st.sampled_from(["bf16", "fp16", "fp32"]),
    storage=st.sampled_from(["uint8", "bf16", "fp16", "fp32"]),
    skip=NAMES,
)
QUANTIZATIONS = FOUR_BIT | st.builds(Quantization, scheme=st.just("int8"), skip=NAMES)


@given(QUANTIZATIONS)
def test_text_form_round_trips(quant: Quantization) -> None:
    assert Quantization.parse(str(quant)) == quant


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("nf4", "nf4"),
        ("nf4,compute=bf16,storage=uint8", "nf4"),
        ("fp4, storage=torch.float16 ,double,compute=float32", "fp4,double,compute=fp32,storage=fp16"),
        ("nf4,compute=half", "nf4,compute=fp16"),
        ("int8,skip=lm_head,skip=a+b,skip=a", "int8,skip=lm_head+a+b"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(Quantization.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "known: nf4 or fp4"),
        ("nf5", "unknown quantization 'nf5'"),
        ("NF4", "unknown quantization 'NF4'"),
        ("nf4,", "unknown quantization option ''"),
        ("nf4,dobule", "unknown quantization option 'dobule'"),
        ("nf4,double=1", "unknown quantization option 'double=1'"),
        ("nf4,compute", "unknown quantization option 'compute'"),
        ("nf4,compute=int4", "unknown compute dtype 'int4'"),
        ("nf4,compute=uint8", "known: bf16, fp16, fp32"),
        ("nf4,storage=int8", "known: bf16, fp16, fp32, uint8"),
        ("nf4,skip=", "unknown quantization option 'skip='"),
        ("nf4,skip=+", "unknown quantization option 'skip=+'"),
        ("nf4,double,double", "double stands twice"),
        ("nf4,compute=bf16,compute=fp16", "compute stands twice"),
        ("int8,double", "int8 takes only skip=MODULE, not double"),
        ("int8,compute=bf16", "int8 takes only skip=MODULE, not compute"),
    ],
)
def test_unknown_options_are_told_in_one_line(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantization.parse(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(UsageError):
        assert text.strip().startswith(Quantization.parse(text).scheme)


def test_int8_has_no_4_bit_options() -> None:
    with pytest.raises(UsageError, match="int8 takes only skip"):
        Quantization.of(registry.schemes()["int8"], {"double": True})


@given(QUANTIZATIONS)
def test_transformers_configuration_describes_the_same(quant: Quantization) -> None:
    assert Quantization.of_checkpoint(quant.config().to_dict()) == quant


def test_extra_skip_comes_first_and_once() -> None:
    quant = Quantization.parse("int8,skip=b+c")
    assert quant.config(["a", "b"]).llm_int8_skip_modules == ["a", "b", "c"]
    assert Quantization.parse("nf4").config().llm_int8_skip_modules is None


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "eetq"}, "quantized with eetq"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "quantized as 'nf3'"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": 7}, "unknown compute dtype 7"),
    ],
)
def test_foreign_checkpoints_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Quantization.of_checkpoint(config)


def test_import_brings_no_torch() -> None:
    code = (
        "import sys, kbitcheck.backends.quantization; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
