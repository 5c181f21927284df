"""What is right is not flagged: the reference, PEFT where it is right, and unusual implementations."""

import functools
from dataclasses import replace
from importlib.metadata import version

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from kbitcheck_reference import prepare_model_for_kbit_training as reference

from kbitcheck.backends.bitsandbytes import arithmetic
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Level, Party, Status
from kbitcheck.core.rule import judge, rules, select
from kbitcheck.judge.attribution import BARE
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from kbitcheck.run.suites import RECIPES
from tests.few_steps import EACH_HALF, of_few_steps
from tests.shallow import shallow


def walks_modules(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None, verbose=False, **ignored):
    """Walks modules instead of parameters, freezes last, takes more keywords."""
    kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "quant_state"):
                parameter.data = parameter.data.to(dtype=torch.float32)
    if use_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(kwargs)
        if not model._require_grads_hooks if hasattr(model, "_require_grads_hooks") else True:
            model.enable_input_require_grads()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


class Preparer:
    """Callable by its class."""

    def __call__(self, model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        return reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


def reentrant_by_default(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    return reference(
        model, use_gradient_checkpointing, {"use_reentrant": True, **(gradient_checkpointing_kwargs or {})}
    )


HEALTHY = {
    "partial": functools.partial(reference),
    "callable_object": Preparer(),
    "reentrant_by_default": reentrant_by_default,
}


def broken(
    prepare,
    bases,
    *,
    model,
    quant,
    checkpointing,
    levels=(Level.MUST, Level.SHOULD),
    codes=(),
    source_of=shallow,
    **options,
):
    """Rules of these levels that the case breaks by its own fault, or that could not be judged.

    What a bare base fails alike counts too: in a healthy model that is a bound of ours that does not hold.
    """
    spec = CaseSpec(model=model, quant=quant, implementation="given", checkpointing=checkpointing, **options)
    key = (source_of, model, quant)
    if key not in bases:
        bases[key] = Loaded.from_source(source_of(model), spec)
    case = Case(spec, prepare, bases[key])
    results = [judge(rule, case) for rule in select() if not codes or rule.code in codes]
    case.close()
    own = {r.rule: [f for f in r.failures if f.party is Party.IMPLEMENTATION or f.witness == BARE] for r in results}
    return {
        r.rule: r.reason or str(own[r.rule][0])
        for r in results
        if r.status is Status.ERROR or (r.status is Status.FAIL and own[r.rule] and r.level in levels)
    }


# The first passes on what it was not given; the others are the reference, called otherwise.
OF_CALLS = [
    *[("reentrant_by_default", "nf4", mode) for mode in ("default", "off")],
    ("partial", "nf4", "default"),
    ("callable_object", "int8", "reentrant"),
]


@EACH_HALF
@pytest.mark.parametrize(("quant", "checkpointing"), [("nf4", "default"), ("int8", "reentrant"), ("nf4", "off")])
def test_an_unusual_implementation_keeps_every_must(quant, checkpointing, codes, bases):
    case = {"model": "tiny:gpt2", "quant": quant, "checkpointing": checkpointing}
    assert broken(walks_modules, bases, **case, levels=(Level.MUST,), codes=codes) == {}


@pytest.mark.parametrize(("name", "quant", "checkpointing"), OF_CALLS)
def test_an_unusual_call_keeps_every_must(name, quant, checkpointing, bases):
    codes = [rule.code for rule in select(["KB1", "KB4", "KB5"])]
    case = {"model": "tiny:gpt2", "quant": quant, "checkpointing": checkpointing}
    assert broken(HEALTHY[name], bases, **case, levels=(Level.MUST,), codes=codes) == {}


# Of whole recipes the slow grid judges every rule.
OF_KINDS = tuple(code for code in of_few_steps() if code.startswith(("KB1", "KB2", "KB304", "KB4")))
# Each recipe, scheme, option and mode once; the slow grid crosses them.
CELLS = [
    ("tiny:llama", "nf4,double,storage=bf16", "default", ()),
    ("tiny:gpt2", "int8", "reentrant", ()),
    ("tiny:gpt2", "nf4,storage=fp32,compute=fp16", "reentrant", of_few_steps()),
    ("tiny:bert", "fp4", "reentrant", of_few_steps()),
    ("tiny:gemma", "nf4", "non-reentrant", OF_KINDS),
    ("tiny:mixtral", "nf4", "off", of_few_steps()),
    ("tiny:opt", "int8", "non-reentrant", OF_KINDS),
    ("tiny:qwen3", "nf4", "non-reentrant", OF_KINDS),
    ("tiny:t5", "int8", "non-reentrant", of_few_steps()),
]


def broken_by_the_reference(bases, *, model, **case):
    found = broken(reference, bases, model=model, **case)
    if version("transformers") < "5" and model == "tiny:t5":
        found.pop("KB406", None)  # the first block hands the biases of positions on to all others
    return found


@pytest.mark.parametrize(("model", "quant", "checkpointing", "codes"), CELLS)
def test_the_reference_keeps_everything(model, quant, checkpointing, codes, bases):
    case = {"model": model, "quant": quant, "checkpointing": checkpointing}
    assert broken_by_the_reference(bases, **case, codes=codes) == {}


def dropping(name):
    """A shallow recipe with the dropout that its type has by default."""
    source = shallow(name)
    return replace(source, config={field: 0.1 if "pdrop" in field else value for field, value in source.config.items()})


def test_a_model_that_drops_breaks_nothing_whoever_is_at_fault():
    spec = CaseSpec(model="tiny:gpt2", quant="nf4", implementation="reference", checkpointing="reentrant")
    case = Case(spec, reference, Loaded.from_source(dropping("tiny:gpt2"), spec))
    results = [judge(rule, case) for rule in select(["KB304", "KB305", "KB310", "KB311"])]
    case.close()
    assert {r.rule: r.reason or r.failures[:1] for r in results if r.status is not Status.PASS} == {}
    assert 0.1 in dropping("tiny:gpt2").config.values()


# Every rule of each recipe and each scheme; of many steps, for each recipe in one scheme.
GRID = [
    *[(f"tiny:{recipe}", "nf4", "non-reentrant", ()) for recipe in RECIPES[::2]],
    *[(f"tiny:{recipe}", "int8", "non-reentrant", of_few_steps()) for recipe in RECIPES[::2]],
    *[(f"tiny:{recipe}", "int8", "non-reentrant", ()) for recipe in RECIPES[1::2]],
    *[(f"tiny:{recipe}", "nf4", "non-reentrant", of_few_steps()) for recipe in RECIPES[1::2]],
    *[(f"tiny:{recipe}", "fp4", "reentrant", of_few_steps()) for recipe in ("llama", "llava", "whisper", "t5")],
    ("tiny:llama", "nf4,double,storage=bf16", "default", of_few_steps()),
    ("tiny:gpt2", "nf4,storage=fp32,compute=fp16", "reentrant", ()),
    ("tiny:mixtral", "nf4", "off", ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "quant", "checkpointing", "codes"), GRID)
def test_the_reference_keeps_everything_in_whole_recipes_too(model, quant, checkpointing, codes, bases):
    case = {"model": model, "quant": quant, "checkpointing": checkpointing, "codes": codes}
    assert broken_by_the_reference(bases, **case, source_of=resolve) == {}


@pytest.mark.slow
@pytest.mark.transformers5("transformers 4 does not know all of these")
@pytest.mark.parametrize(
    "name",
    [
        "xglm",  # whose code is not made for float64, so that there is no twin
        "blt",  # writes into its embedding's output, which is a leaf once it requires grad
        "hrm_text",  # runs its blocks several times in a step
        "recurrent_gemma",  # keeps its state, with its graph, from step to step
    ],
)
def test_what_a_model_cannot_bear_is_not_the_references(name, bases):
    case = {"model": f"arch:{name}", "quant": "nf4", "checkpointing": "non-reentrant"}
    assert broken(reference, bases, **case, source_of=resolve) == {}


@EACH_HALF
@pytest.mark.parametrize("model", ["tiny:gpt2", pytest.param("tiny:llama", marks=pytest.mark.slow)])
def test_the_reference_keeps_everything_where_int8_layers_round_their_inputs(model, codes, monkeypatch):
    """As they do on every accelerator; bitsandbytes' own kernel for those, run on a CPU."""

    def matmul(A, B, out=None, state=None, threshold=0.0, bias=None):
        state.threshold = threshold or state.threshold
        return MatMul8bitLt.apply(A, B, out, bias, state)

    case = {"model": model, "quant": "int8", "checkpointing": "reentrant"}
    monkeypatch.setattr(bitsandbytes, "matmul", matmul)
    told = ("KB209", "KB304")  # from a CPU's arithmetic, by the yardstick
    assert set(broken(reference, {}, **case, codes=told)) == set(told)
    monkeypatch.setattr(arithmetic, "UNROUNDED", ())
    assert broken(reference, {}, **case, codes=codes) == {}


@pytest.mark.parametrize(
    ("model", "quant", "codes"), [("tiny:llama", "nf4", of_few_steps()), ("tiny:gpt2", "int8", ())]
)
def test_peft_breaks_no_must_and_the_known_shoulds(model, quant, codes, bases):
    peft = pytest.importorskip("peft")
    case = {"model": model, "quant": quant, "checkpointing": "default", "codes": codes}
    found = broken(peft.prepare_model_for_kbit_training, bases, **case)
    assert {rules()[code].level for code in found} == {Level.SHOULD}
    assert {"KB106", "KB407", "KB506"} <= set(found)


@EACH_HALF
def test_pefts_adapters_are_judged_like_our_own(codes, bases):
    pytest.importorskip("peft")
    case = {"model": "tiny:llama", "quant": "nf4", "checkpointing": "reentrant"}
    assert broken(reference, bases, **case, adapters="peft", codes=codes) == {}


@pytest.mark.parametrize("profile", ["qlora", "frozen-half"])
def test_profiles_judge_what_they_promise(profile, bases):
    """Under ``qlora`` norms alone become fp32, under ``frozen-half`` nothing does; under ``peft`` both are wrong."""

    def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
        half = {n: p.dtype for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        for name, parameter in model.named_parameters():
            if name in half and not (profile == "qlora" and "norm" in name):
                parameter.data = parameter.data.to(half[name])
        return model

    case = {"model": "tiny:llama", "quant": "nf4", "checkpointing": "reentrant", "levels": (Level.MUST,)}
    # Every rule judges preparations under these profiles in tests/forks/test_variants.py.
    codes = [rule.code for rule in select(["KB1", "KB2", "KB303", "KB304"])]
    assert broken(prepare, bases, **case, codes=codes, profile=profile) == {}
    assert "KB202" in broken(prepare, bases, **case, codes=("KB202",))
