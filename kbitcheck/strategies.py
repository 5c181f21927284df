"""Hypothesis strategies for recipes, quantizations, call arguments, batches and whole cases. No torch here.

Everything drawn is plain data (a recipe's TOML, the text of ``--quant``): a failure shrinks, prints as a file to paste,
and replays with one command.
"""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, cast, get_args

import tomlkit
from hypothesis import strategies as st

from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec, Checkpointing

__all__ = ["batches", "call_arguments", "cases", "quantizations", "recipes"]

Data = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

MODES: tuple[Checkpointing, ...] = get_args(Checkpointing)
DTYPES = ("bf16", "fp16", "fp32")
RATES = (0.0, 0.1, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture, a row of ``drawn.toml``, which explains the fields."""

    architecture: str
    norm: str
    layers: Sequence[str]
    scale: Mapping[str, float]
    ties: Sequence[bool]
    head_step: int
    config: Mapping[str, Any]
    skip: Sequence[str] = ()


_TABLES: Data = tomllib.loads((files("kbitcheck.models.zoo") / "drawn.toml").read_text(encoding="utf-8"))
FAMILIES: dict[str, Family] = {name: Family(**row) for name, row in _TABLES["families"].items()}
NORMS = tuple(dict.fromkeys(family.norm for family in FAMILIES.values()))


def _multiples(low: int, high: int, step: int) -> st.SearchStrategy[int]:
    return st.integers(-(-low // step), high // step).map(lambda n: n * step)


def _more(draw: Draw, family: str, drawn: Data, grain: int) -> Data:
    """Fields of a configuration that no other family has, or that the other sizes do not decide."""
    match family:
        case "gemma" | "qwen3":  # heads need not divide the width
            return {"head_dim": draw(_multiples(4, 16, math.lcm(2, grain)))}
        case "mixtral":
            experts = draw(st.integers(2, 4))
            return {"num_local_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}
        case "gpt_neox":
            return {"use_parallel_residual": draw(st.booleans())}
        case "opt":
            return {"do_layer_norm_before": draw(st.booleans())}
        case "bert":
            return {"num_labels": draw(st.integers(2, 5))}
        case "t5":
            layers = draw(st.integers(1, 2))
            return {"num_decoder_layers": layers, "feed_forward_proj": draw(st.sampled_from(["relu", "gated-gelu"]))}
        case "whisper":
            ranges = {"decoder_layers": (1, 2), "num_mel_bins": (2, 20), "max_source_positions": (4, 16)}
            return {name: draw(st.integers(*bounds)) for name, bounds in ranges.items()}
        case "llava":
            return _vision(draw, drawn, grain)
    return {}


def _vision(draw: Draw, drawn: Data, grain: int) -> Data:
    side, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "image_token_id": drawn["vocab"] - 1,
        "image_token_index": drawn["vocab"] - 1,
        "image_seq_length": side * side,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": heads * draw(_multiples(-(-16 // heads), 24, grain)),
            "intermediate_size": draw(_multiples(16, 64, grain)),
            "num_hidden_layers": draw(st.integers(2, 3)),
            "num_attention_heads": heads,
            "image_size": side * 4,
            "patch_size": 4,
            "projection_dim": 12,
            "attention_dropout": drawn["dropout"],
        },
    }


def _with_sizes(table: Mapping[str, Any], drawn: Data) -> Data:
    """A table of ``drawn.toml`` with the tables that it is like, and with the drawn sizes."""
    filled: Data = {}
    for name, value in table.items():
        if name == "like":
            filled |= _with_sizes(_TABLES[value], drawn)
        elif isinstance(value, Mapping):
            filled[name] = _with_sizes(value, drawn)
        else:
            is_size = isinstance(value, str) and value.startswith("$")
            filled[name] = drawn[value[1:]] if is_size else value
    return filled


@st.composite
def sizes(draw: Draw, family: Family, *, grain: int) -> Data:
    """Sizes of a model of this family, a few thousand parameters; widths of layers are multiples of ``grain``, of nothing more."""
    heads = draw(st.integers(1, 4))
    drawn = {
        "vocab": draw(st.integers(24, 140)),
        "depth": draw(st.integers(1, 3)),
        "heads": heads,
        "groups": draw(st.sampled_from([d for d in range(heads, 0, -1) if heads % d == 0])),
        # Below 16 wide no rounding averages out: int8 activations alone move a model four wide by a seventh.
        "head": draw(_multiples(max(4, -(-16 // heads)), 24, math.lcm(family.head_step, grain))),
        "inner": draw(_multiples(16, 100, grain)),
        "tied": draw(st.sampled_from(family.ties)),
        "bias": draw(st.booleans()),
        "dropout": draw(st.sampled_from(RATES)),
    }
    return {**drawn, "width": heads * drawn["head"]}


@st.composite
def batches(draw: Draw, longest: int = 16) -> list[int]:
    """Lengths of the sequences in a batch of one to four; if they differ, the mask has zeros."""
    return list(draw(st.lists(st.integers(3, longest), min_size=1, max_size=4)))


@st.composite
def recipes(
    draw: Draw, families: Sequence[str] = tuple(FAMILIES), norms: Sequence[str] = NORMS, *, grain: int = 1
) -> Data:
    """The content of a recipe file (see ``fixtures/``): an architecture of these families and norms, its sizes, its batch.

    Inputs and outputs of linear layers are multiples of ``grain`` wide.
    """
    name = draw(st.sampled_from([n for n in families if FAMILIES[n].norm in norms]))
    family = FAMILIES[name]
    drawn = draw(sizes(family, grain=grain))
    recipe: Data = {
        "architecture": family.architecture,
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": str(draw(st.integers(0, 9))),
        "lengths": draw(batches()),
        "scale": dict(family.scale),
        "config": _with_sizes(family.config, drawn) | _more(draw, name, drawn, grain),
    }
    if family.skip:
        recipe["skip"] = list(family.skip)
    return recipe


def family_of(recipe: Mapping[str, Any]) -> str:
    """The key in ``FAMILIES`` of a drawn recipe."""
    return next(name for name, family in FAMILIES.items() if family.architecture == recipe["architecture"])


@st.composite
def quantizations(draw: Draw, schemes: Sequence[str] = (), skippable: Sequence[str] = ()) -> str:
    """The text of a ``--quant``, of any scheme or one of ``schemes``; at most one of ``skippable`` stays unquantized."""
    every = registry.schemes()
    scheme = every[draw(st.sampled_from(schemes or registry.run_here()))]
    skip = draw(st.one_of(st.just(()), st.tuples(st.sampled_from(skippable)))) if skippable else ()
    drawn = [option for option in scheme.options if option.every_model]
    values = {o.name: draw(st.sampled_from(o.choices) if o.choices else st.booleans()) for o in drawn}
    return str(Quantization.of(scheme, values, skip))


def call_arguments() -> st.SearchStrategy[Data]:
    """Keyword arguments of a preparation as users pass them: none, some or all, ``None`` and an empty dictionary too."""
    inner = st.fixed_dictionaries({}, optional={"use_reentrant": st.booleans(), "preserve_rng_state": st.booleans()})
    arguments = {"use_gradient_checkpointing": st.booleans(), "gradient_checkpointing_kwargs": st.none() | inner}
    return st.fixed_dictionaries({}, optional=arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A case as plain data: a recipe or a model's name, its quantization, checkpointing and seed."""

    model: Data | str
    quant: str
    checkpointing: Checkpointing
    seed: int = 0

    @property
    def toml(self) -> str:
        """The recipe as a file; empty for a model's name."""
        return "" if isinstance(self.model, str) else tomlkit.dumps(self.model)

    def spec(self, model: str, implementation: str, **options: Any) -> CaseSpec:
        """The case, with the recipe under the name ``model``."""
        own = {"quant": self.quant, "checkpointing": self.checkpointing, "seed": self.seed}
        return CaseSpec(model=model, implementation=implementation, **{**options, **own})


@st.composite
def cases(
    draw: Draw, *, models: Sequence[str] = (), quants: Sequence[str] = (), checkpointing: Sequence[Checkpointing] = ()
) -> Drawn:
    """A case from the ``models``, ``quants`` and ``checkpointing`` named; whatever is not named is drawn."""
    quant = Quantization.parse(draw(st.sampled_from(list(quants)) if quants else quantizations()))
    # Wider words than bytes hold whole layers alone: 4-bit weights of a layer are packed into as many as fit.
    grain = 1 if quant["storage"] in ("", "uint8") else 4
    model: Data | str = draw(st.sampled_from(list(models)) if models else recipes(grain=grain))
    if not quants and not isinstance(model, str) and draw(st.booleans()):
        quant = replace(quant, skip=(draw(st.sampled_from(FAMILIES[family_of(model)].layers)),))
    return Drawn(
        model=model,
        quant=str(quant),
        checkpointing=cast(Checkpointing, draw(st.sampled_from(list(checkpointing) or list(MODES)))),
        seed=draw(st.integers(0, 3)),
    )
