"""Drawn batches are what their conditions say, and the same for the same case."""

from functools import partial

import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.conditions import TURNS, has_turn
from kbitcheck.models.inputs.drawn import LONG, ROWS, SHORT, Conditions
from kbitcheck.models.inputs.text import IGNORED
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.forecast.predict import token_limit
from kbitcheck.run.suites import QUICK, cases

MANY = [Conditions.drawn(str(seed), limit=1000, large=False) for seed in range(60)]


def test_every_condition_is_drawn():
    assert {c.rows for c in MANY} == {1, *ROWS}
    assert all((c.rows == 1) is (c.length > 512) for c in MANY)
    assert {c.padding for c in MANY} == {"right", "left", "none"}
    assert {c.ignored for c in MANY} == {0, 2, 3}
    assert {(c.repeated, c.silent) for c in MANY if c.rows > 1} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert not any(c.repeated or c.silent for c in MANY if c.rows == 1)
    assert all(c.length % 2 or c.length % 64 == 0 for c in MANY)
    assert {c.length % 2 for c in MANY} == {0, 1}
    assert all(SHORT[0] <= c.length <= SHORT[1] or LONG[0] <= c.length <= LONG[1] for c in MANY)
    assert {c.length > 512 for c in MANY} == {True, False}
    assert Conditions.drawn("7", limit=1000, large=False) == MANY[7]


def test_a_large_model_gets_a_short_batch_and_none_is_beyond_the_limit():
    large = [Conditions.drawn(str(seed), limit=66, large=True) for seed in range(60)]
    assert {c.rows for c in large} == {ROWS[0]}
    assert max(c.length for c in large) == 65


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cases_that_take_turns_have_among_them_each_padding_and_a_long_batch(seed):
    specs = [CaseSpec(model="m", quant="nf4", implementation="", seed=seed, conditions=f"{n}/9") for n in (1, 4, 7)]
    turns = [Conditions.of_case(spec, limit=1000, large=False) for spec in specs]
    assert {c.padding for c in turns} == {"right", "left", "none"}
    assert sorted(c.length > 512 for c in turns) == [False, False, True]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cases_that_take_turns_have_a_silent_row_and_two_rows_alike(seed):
    specs = [CaseSpec(model="m", quant="nf4", implementation="", seed=seed, conditions=f"{n}/9") for n in (1, 4, 7)]
    turns = [Conditions.of_case(spec, limit=1000, large=False) for spec in specs]
    assert sorted(c.silent for c in turns) == sorted(c.repeated for c in turns) == [False, False, True]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_batch_of_the_quick_suite_is_beyond_512_tokens(seed):
    specs = [s for s in cases(QUICK, implementation="", seed=seed) if has_turn(s.conditions, seed, 0, TURNS)]
    limits = {spec.model: token_limit(resolve(spec.model).meta(Quantization.parse(spec.quant))) for spec in specs}
    lengths = [Conditions.of_case(spec, limit=limits[spec.model], large=False).length for spec in specs]
    assert len(lengths) == 3
    assert max(lengths) > 512


@pytest.mark.parametrize(("name", "limit"), [("llama", 128), ("roberta", 126), ("mpt", 128)])
def test_the_most_tokens_that_a_model_takes_are_what_it_runs_on(name, limit):
    """RoBERTa's table of positions has a row for padding; MPT names its limit otherwise."""
    model = resolve(f"arch:{name}").load(Quantization.parse("nf4"), "cpu").eval()
    assert token_limit(model) == limit
    ids = torch.full((1, limit), 5)
    with torch.no_grad():
        model(input_ids=ids)
    if name != "llama":  # which computes its positions
        with pytest.raises((RuntimeError, IndexError)):
            model(input_ids=torch.full((1, limit + 1), 5))


@pytest.fixture(scope="module")
def model():
    return resolve("tiny:llama").meta(Quantization.parse("nf4")).to_empty(device="cpu")


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("ignored", [0, 3])
def test_a_batch_is_what_its_conditions_say(model, padding, ignored):
    conditions = Conditions(rows=3, length=65, padding=padding, ignored=ignored)
    batch = conditions.batch(lambda **shape: resolve("tiny:llama").batch(model, seed=0, **shape))
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.shape == mask.shape == labels.shape == (3, 65)
    assert mask[:2].all()
    ends = {"right": (True, False), "left": (False, True), "none": (True, True)}[padding]
    assert (bool(mask[-1, 0]), bool(mask[-1, -1])) == ends
    counts = labels != IGNORED
    expected = mask.bool() & (torch.arange(65) % ignored != 0 if ignored else torch.ones(65, dtype=torch.bool))
    assert counts.equal(expected)
    assert ids[counts].equal(labels[counts])
    assert str(conditions).startswith("3 rows of 65 tokens, ")


@pytest.mark.parametrize(("padding", "first", "last"), [("left", 0, 1), ("right", 1, 0), ("none", 1, 1)])
def test_a_batch_of_one_row_is_padded_as_it_says(model, padding, first, last):
    conditions = Conditions(rows=1, length=67, padding=padding, ignored=0)
    made = conditions.batch(partial(resolve("tiny:llama").batch, model, seed=0))
    mask = made["attention_mask"]
    assert mask.shape == (1, 67)
    assert (int(mask[0, 0]), int(mask[0, -1])) == (first, last)


def test_rows_alike_and_a_row_without_labels(model):
    conditions = Conditions(rows=3, length=65, padding="right", ignored=0, repeated=True, silent=True)
    made = conditions.batch(partial(resolve("tiny:llama").batch, model, seed=0))
    ids, labels = made["input_ids"], made["labels"]
    assert (ids[0].equal(ids[1]), ids[1].equal(ids[2])) == (True, False)
    assert [bool((row != IGNORED).any()) for row in labels] == [False, True, True]
    assert str(conditions) == "3 rows of 65 tokens, padded on the right, two rows alike, no label of one row counts"
    assert str(Conditions(rows=1, length=65, padding="none", ignored=0)).startswith("one row of 65 tokens")
