"""Each release of PEFT's function is found guilty of its real bugs, and of nothing else."""

import pytest
from transformers import PreTrainedModel

from kbitcheck.core.result import Level
from kbitcheck.core.rule import rules
from tests.few_steps import EACH_HALF
from tests.forks.historical import RELEASES, behaviour, implementation
from tests.forks.judged import broken

pytestmark = pytest.mark.xdist_group("historical")  # what is found of a behaviour is shared
TRANSFORMERS_5 = hasattr(PreTrainedModel, "activation_checkpointing_enable")
MUSTS = {code for code, rule in rules().items() if rule.level is Level.MUST}
# Still so today: it freezes adapters that are there already, hooks anew with every call, stops half-way where a model
# cannot checkpoint, and calls transformers by a deprecated name.
ALWAYS = {"KB106", "KB504", "KB506", "KB509"}
# Without an argument for the mode the input hook is always set, beside transformers' own.
NO_ARGUMENTS = {"KB501", "KB505"}
# Weights packed in bfloat16 are cast: other bytes, other numbers, more memory, and a model that neither runs nor reloads.
CAST = {"KB205", "KB206", "KB210", "KB510", "KB603"}
EXPECTED = {
    # Knows int8 alone: asked for, checkpointing stays off, and nothing is said; so nothing is hooked either.
    "0.3.0": (ALWAYS | NO_ARGUMENTS | CAST | {"KB401"}) - {"KB504", "KB505", "KB509"},
    "0.4.0": ALWAYS | NO_ARGUMENTS | CAST,
    "0.5.0": ALWAYS | NO_ARGUMENTS | CAST,
    "0.6.0": ALWAYS | CAST,
    "0.9.0": ALWAYS | CAST,
    **dict.fromkeys(("0.10.0", "0.11.0", "0.14.0", "0.15.0", "0.20.0"), ALWAYS),
}


@pytest.fixture(scope="module")
def found(bases):
    """What each behaviour is found guilty of, judged once."""
    known = {}

    def of(release, codes):
        how = behaviour(release)
        if (how, codes) not in known:
            case = {"model": "tiny:gpt2", "quant": "nf4,storage=bf16", "checkpointing": "non-reentrant"}
            known[how, codes] = broken(implementation(how), bases, **case, codes=codes)
        return known[how, codes]

    return of


@EACH_HALF
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_named_for_its_own_bugs(release, codes, found):
    expected = EXPECTED[release] & {*codes}
    if TRANSFORMERS_5:
        assert found(release, codes) == expected
    else:  # which hooks nothing by itself and deprecates nothing
        assert {c for c in found(release, codes) if rules()[c].level is Level.MUST} == expected & MUSTS


@pytest.mark.parametrize(("release", "expected"), [("0.5.0", {"KB404", "KB501"}), ("0.6.0", {"KB407"})])
def test_arguments_for_checkpointing_and_the_mode_that_is_left_implicit(release, expected, bases):
    codes = {"KB401", "KB403", "KB404", "KB407", "KB501"}
    case = {"model": "tiny:gpt2", "quant": "int8", "checkpointing": "default", "codes": codes}
    assert broken(implementation(behaviour(release)), bases, **case) == expected
