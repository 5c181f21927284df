"""What is drawn is plain data that replays, and everything that can be drawn really is."""

import tomllib

import pytest
from hypothesis import HealthCheck, given, settings

from kbitcheck import strategies
from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources import recipe as recipes_of
from kbitcheck.strategies import Drawn


@pytest.fixture(scope="module")
def drawn():
    """Four hundred cases, as the fuzzer draws them."""
    found: list[Drawn] = []

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategies.cases())
    def collect(case):
        found.append(case)

    collect()
    return found


def test_every_family_is_drawn(drawn):
    assert {strategies.family_of(c.model) for c in drawn} == set(strategies.FAMILIES)


def test_every_norm_is_drawn(drawn):
    assert {strategies.FAMILIES[strategies.family_of(c.model)].norm for c in drawn} == set(strategies.NORMS)


def test_both_ties_are_drawn(drawn):
    assert {c.model["config"].get("tie_word_embeddings") for c in drawn} >= {True, False}


def test_every_quantization_is_drawn(drawn):
    found = [Quantization.parse(c.quant) for c in drawn]
    four = [q for q in found if registry.schemes()[q.scheme].bits == 4]
    assert {q.scheme for q in found} == set(registry.run_here())
    assert {q["double"] for q in four} == {"", "double"}
    assert {q["compute"] for q in four} == {"bf16", "fp16", "fp32"}
    assert {q["storage"] for q in four} == {"uint8", "bf16", "fp16", "fp32"}
    assert {bool(q.skip) for q in found} == {True, False}


def test_every_mode_dtype_and_dropout_is_drawn(drawn):
    assert {c.checkpointing for c in drawn} == set(strategies.MODES)
    assert {c.model["dtype"] for c in drawn} == set(strategies.DTYPES)
    rates = {c.model["config"]["attention_dropout"] for c in drawn if "attention_dropout" in c.model["config"]}
    assert rates == set(strategies.RATES)


def test_sizes_are_multiples_of_nothing(drawn):
    vocabularies = {c.model["config"]["vocab_size"] for c in drawn if "vocab_size" in c.model["config"]}
    assert {v % 2 for v in vocabularies} == {0, 1}
    grouped = [c.model["config"] for c in drawn if "num_key_value_heads" in c.model["config"]]
    assert {g["num_key_value_heads"] < g["num_attention_heads"] for g in grouped} == {True, False}
    biased = {g["attention_bias"] for g in grouped if "attention_bias" in g}
    assert biased == {True, False}


def test_batches_are_of_one_to_four_rows_and_some_are_ragged(drawn):
    lengths = [c.model["lengths"] for c in drawn]
    assert {len(rows) for rows in lengths} == {1, 2, 3, 4}
    assert {len(set(rows)) > 1 for rows in lengths} == {True, False}


def test_words_wider_than_a_byte_are_drawn_for_widths_that_they_divide(drawn):
    """bitsandbytes packs a layer's nibbles into whole words, and cannot load what does not fill them."""
    wide = [c for c in drawn if Quantization.parse(c.quant)["storage"] not in ("", "uint8")]
    llamas = [c.model["config"] for c in wide if strategies.family_of(c.model) == "llama"]
    assert llamas
    assert {n["hidden_size"] % 4 for n in llamas} | {n["intermediate_size"] % 4 for n in llamas} == {0}


def test_a_recipe_prints_as_a_file_that_reads_back(drawn, tmp_path):
    for case in drawn[:60]:
        assert tomllib.loads(case.toml) == case.model
    file = tmp_path / "pasted.toml"
    file.write_text(case.toml, encoding="utf-8")
    read = recipes_of.read(file)
    assert (read.seed, list(read.lengths)) == (case.model["seed"], case.model["lengths"])


def test_a_text_needs_no_quotes_only_where_toml_does_not():
    data = {"architecture": 'A "b" \\ c', "scale": {"*.weight": 0.5, "plain": 1.0}, "config": {"inner": {"x": [1, 2]}}}
    assert tomllib.loads(Drawn(model=data, quant="nf4", checkpointing="default").toml) == data


@pytest.mark.parametrize("lengths", ["[0, 3]", "[true]", '["3"]'])
def test_lengths_that_are_no_numbers_of_tokens_are_refused(lengths, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(
        f'architecture = "LlamaForCausalLM"\nlengths = {lengths}\n[config]\nmodel_type = "llama"\n', encoding="utf-8"
    )
    with pytest.raises(UsageError, match="lengths must be numbers of tokens"):
        recipes_of.read(file)


def test_call_arguments_are_what_users_give():
    found = []

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(strategies.call_arguments())
    def collect(arguments):
        found.append(arguments)

    collect()
    inner = [a["gradient_checkpointing_kwargs"] for a in found if "gradient_checkpointing_kwargs" in a]
    assert {} in found
    assert None in inner
    assert {} in inner
    assert {k["use_reentrant"] for k in inner if k and "use_reentrant" in k} == {True, False}
    assert {a["use_gradient_checkpointing"] for a in found if "use_gradient_checkpointing" in a} == {True, False}
