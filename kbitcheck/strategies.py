"""Hypothesis strategies for what a case is made of: recipes, quantizations, call arguments, batches. No torch here.

Everything drawn is plain data: a recipe is what its TOML file holds, a quantization the text of ``--quant``. So a failure
shrinks, prints as a file to paste, and replays with one command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from hypothesis import strategies as st

from kbitcheck.backends import registry
from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec, Checkpointing
from kbitcheck.models.sources import recipe as recipes_of

__all__ = ["batches", "call_arguments", "cases", "quantizations", "recipes"]

Data = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

MODES: tuple[Checkpointing, ...] = get_args(Checkpointing)
DTYPES = ("bf16", "fp16", "fp32")
RATES = (0.0, 0.1, 0.5)
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What every family has. ``width`` is ``heads`` times ``head``; nothing is a multiple of anything on purpose."""

    vocab: int
    depth: int
    heads: int
    groups: int
    head: int
    inner: int
    tied: bool
    bias: bool
    dropout: float
    grain: int

    @property
    def width(self) -> int:
        return self.heads * self.head


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture: how sizes become its configuration, which norm it has, what its linear layers are called."""

    architecture: str
    norm: str
    configure: Callable[[_Sizes, Draw], Data]
    layers: tuple[str, ...]
    scale: Mapping[str, float]
    ties: tuple[bool, ...] = (False, True)
    head_step: int = 2  # rotary positions turn pairs of numbers


def _multiples(low: int, high: int, step: int) -> st.SearchStrategy[int]:
    return st.integers(-(-low // step), high // step).map(lambda n: n * step)


def _head_dims(s: _Sizes) -> st.SearchStrategy[int]:
    """Of families whose heads need not divide the width."""
    return _multiples(4, 16, math.lcm(2, s.grain))


def _decoder(kind: str, s: _Sizes, **more: Any) -> Data:
    """What the Llama-like families share."""
    return {
        "model_type": kind,
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "intermediate_size": s.inner,
        "num_hidden_layers": s.depth,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.groups,
        "max_position_embeddings": 64,
        "attention_dropout": s.dropout,
        "tie_word_embeddings": s.tied,
        **TOKENS,
        **more,
    }


def _llama(s: _Sizes, draw: Draw) -> Data:
    return _decoder("llama", s, attention_bias=s.bias, mlp_bias=s.bias, rms_norm_eps=1e-5)


def _gemma(s: _Sizes, draw: Draw) -> Data:
    return _decoder("gemma", s, head_dim=draw(_head_dims(s)), attention_bias=s.bias, hidden_act="gelu_pytorch_tanh")


def _qwen2(s: _Sizes, draw: Draw) -> Data:
    return _decoder("qwen2", s, rms_norm_eps=1e-6)


def _qwen3(s: _Sizes, draw: Draw) -> Data:
    return _decoder("qwen3", s, head_dim=draw(_head_dims(s)), attention_bias=s.bias, rms_norm_eps=1e-6)


def _mixtral(s: _Sizes, draw: Draw) -> Data:
    experts = draw(st.integers(2, 4))
    chosen = draw(st.integers(1, experts))
    return _decoder("mixtral", s, num_local_experts=experts, num_experts_per_tok=chosen, output_router_logits=False)


def _gpt_neox(s: _Sizes, draw: Draw) -> Data:
    config = _decoder("gpt_neox", s, hidden_dropout=s.dropout, attention_bias=s.bias)
    config["use_parallel_residual"] = draw(st.booleans())
    del config["num_key_value_heads"]
    return config


def _gpt2(s: _Sizes, draw: Draw) -> Data:
    return {
        "model_type": "gpt2",
        "vocab_size": s.vocab,
        "n_positions": 64,
        "n_embd": s.width,
        "n_inner": s.inner,
        "n_layer": s.depth,
        "n_head": s.heads,
        "attn_pdrop": s.dropout,
        "embd_pdrop": s.dropout,
        "resid_pdrop": s.dropout,
        "tie_word_embeddings": s.tied,
        **TOKENS,
    }


def _opt(s: _Sizes, draw: Draw) -> Data:
    return {
        "model_type": "opt",
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "word_embed_proj_dim": s.width,
        "ffn_dim": s.inner,
        "num_hidden_layers": s.depth,
        "num_attention_heads": s.heads,
        "max_position_embeddings": 64,
        "do_layer_norm_before": draw(st.booleans()),
        "enable_bias": s.bias,
        "dropout": s.dropout,
        "attention_dropout": s.dropout,
        "layerdrop": 0.0,
        "tie_word_embeddings": s.tied,
        **TOKENS,
    }


def _bert(s: _Sizes, draw: Draw) -> Data:
    return {
        "model_type": "bert",
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "intermediate_size": s.inner,
        "num_hidden_layers": s.depth,
        "num_attention_heads": s.heads,
        "max_position_embeddings": 64,
        "num_labels": draw(st.integers(2, 5)),
        "problem_type": "single_label_classification",
        "hidden_dropout_prob": s.dropout,
        "attention_probs_dropout_prob": s.dropout,
        "classifier_dropout": s.dropout,
        "pad_token_id": 0,
    }


def _t5(s: _Sizes, draw: Draw) -> Data:
    return {
        "model_type": "t5",
        "vocab_size": s.vocab,
        "d_model": s.width,
        "d_ff": s.inner,
        "d_kv": s.head,
        "num_layers": s.depth,
        "num_decoder_layers": draw(st.integers(1, 2)),
        "num_heads": s.heads,
        "dropout_rate": s.dropout,
        "feed_forward_proj": draw(st.sampled_from(["relu", "gated-gelu"])),
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _whisper(s: _Sizes, draw: Draw) -> Data:
    return {
        "model_type": "whisper",
        "vocab_size": s.vocab,
        "d_model": s.width,
        "encoder_layers": s.depth,
        "decoder_layers": draw(st.integers(1, 2)),
        "encoder_attention_heads": s.heads,
        "decoder_attention_heads": s.heads,
        "encoder_ffn_dim": s.inner,
        "decoder_ffn_dim": s.inner,
        "num_mel_bins": draw(st.integers(2, 20)),
        "max_source_positions": draw(st.integers(4, 16)),
        "max_target_positions": 64,
        "dropout": s.dropout,
        "attention_dropout": s.dropout,
        "activation_dropout": s.dropout,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 3,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        **TOKENS,
    }


def _llava(s: _Sizes, draw: Draw) -> Data:
    side = draw(st.integers(1, 3))
    heads = draw(st.integers(1, 3))
    text = _decoder("llama", s)
    del text["tie_word_embeddings"]
    return {
        "model_type": "llava",
        "image_token_id": s.vocab - 1,
        "image_token_index": s.vocab - 1,
        "image_seq_length": side * side,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": heads * draw(_multiples(-(-16 // heads), 24, s.grain)),
            "intermediate_size": draw(_multiples(16, 64, s.grain)),
            "num_hidden_layers": draw(st.integers(2, 3)),
            "num_attention_heads": heads,
            "image_size": side * 4,
            "patch_size": 4,
            "projection_dim": 12,
            "attention_dropout": s.dropout,
        },
        "text_config": text,
    }


# Scales keep logits near one, where the embedding is the head; and T5 does not divide its attention scores.
_HEAD = {"*lm_head.weight": 2.0, "*embed_tokens.weight": 0.2}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "rms", _llama, (*ATTENTION, "o_proj", *GATED), _HEAD),
    "gemma": Family("GemmaForCausalLM", "one-plus", _gemma, (*ATTENTION, "o_proj", *GATED), _HEAD),
    "qwen2": Family("Qwen2ForCausalLM", "rms", _qwen2, (*ATTENTION, "o_proj", *GATED), _HEAD),
    "qwen3": Family("Qwen3ForCausalLM", "rms-by-head", _qwen3, (*ATTENTION, "o_proj", *GATED), _HEAD),
    "mixtral": Family("MixtralForCausalLM", "rms", _mixtral, ("q_proj", "v_proj"), _HEAD),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "layer", _gpt_neox, ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
        {"embed_out.weight": 2.0, "gpt_neox.embed_in.weight": 0.2},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "layer", _gpt2, ("c_attn", "c_fc"),
        {"transformer.wte.weight": 0.2, "transformer.wpe.weight": 0.2, "lm_head.weight": 2.0}, head_step=1,
    ),
    "opt": Family(
        "OPTForCausalLM", "layer", _opt, (*ATTENTION, "out_proj", "fc1", "fc2"),
        {**_HEAD, "*embed_positions.weight": 0.2}, head_step=1,
    ),
    "bert": Family(
        "BertForSequenceClassification", "layer", _bert, ("query", "key", "value", "intermediate.dense"),
        {"classifier.weight": 3.0}, ties=(False,), head_step=1,
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "rms", _t5, ("SelfAttention.v", "EncDecAttention.o"),
        {"*.q.weight": 0.06, "*.o.weight": 0.4, "*.wo.weight": 0.4}, ties=(True,), head_step=1,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration", "layer", _whisper, (*ATTENTION, "out_proj", "fc1", "fc2"),
        {"*decoder.embed_tokens.weight": 0.2, "*.embed_positions.weight": 0.2}, ties=(True,), head_step=2,
    ),
    "llava": Family(
        "LlavaForConditionalGeneration", "rms and layer", _llava, (*ATTENTION, *GATED), _HEAD, ties=(False,),
    ),
}  # fmt: skip
NORMS = tuple(dict.fromkeys(family.norm for family in FAMILIES.values()))


@st.composite
def sizes(draw: Draw, family: Family, *, grain: int = 1) -> _Sizes:
    """Sizes of a model of this family, a few thousand parameters; widths of layers are multiples of ``grain``."""
    heads = draw(st.integers(1, 4))
    return _Sizes(
        vocab=draw(st.integers(24, 140)),
        depth=draw(st.integers(1, 3)),
        heads=heads,
        groups=draw(st.sampled_from([d for d in range(heads, 0, -1) if heads % d == 0])),
        # Below 16 wide no rounding averages out: int8 activations alone move a model four wide by a seventh.
        head=draw(_multiples(max(4, -(-16 // heads)), 24, math.lcm(family.head_step, grain))),
        inner=draw(_multiples(16, 100, grain)),
        tied=draw(st.sampled_from(family.ties)),
        bias=draw(st.booleans()),
        dropout=draw(st.sampled_from(RATES)),
        grain=grain,
    )


@st.composite
def batches(draw: Draw, longest: int = 16) -> list[int]:
    """Lengths of the sequences of a batch of one to four; where they differ, the mask has zeros."""
    return list(draw(st.lists(st.integers(3, longest), min_size=1, max_size=4)))


@st.composite
def recipes(
    draw: Draw, families: Sequence[str] = tuple(FAMILIES), norms: Sequence[str] = NORMS, *, grain: int = 1
) -> Data:
    """What a recipe file holds (see ``fixtures/``): an architecture of these families and norms, its sizes, its batch.

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
        "config": family.configure(drawn, draw),
    }
    if name == "bert":
        recipe["skip"] = ["classifier"]
    return recipe


def family_of(recipe: Mapping[str, Any]) -> str:
    """The key in ``FAMILIES`` of a drawn recipe."""
    return next(name for name, family in FAMILIES.items() if family.architecture == recipe["architecture"])


@st.composite
def quantizations(draw: Draw, schemes: Sequence[str] = (), skippable: Sequence[str] = ()) -> str:
    """The text of a ``--quant``, of any scheme or one of ``schemes``; of ``skippable``, module names, at most one stays
    unquantized.
    """
    every = registry.schemes()
    scheme = every[draw(st.sampled_from(schemes or list(every)))]
    skip = draw(st.one_of(st.just(()), st.tuples(st.sampled_from(skippable)))) if skippable else ()
    values = {o.name: draw(st.sampled_from(o.choices) if o.choices else st.booleans()) for o in scheme.options}
    return str(Quantization.of(scheme, values, skip))


def modes() -> st.SearchStrategy[Checkpointing]:
    """A ``--checkpointing``: which arguments the preparation is called with."""
    return st.sampled_from(MODES)


@st.composite
def call_arguments(draw: Draw) -> Data:
    """Keyword arguments of a preparation, as users give them: none, some or all, ``None`` and an empty dictionary too."""
    arguments: Data = {}
    if draw(st.booleans()):
        arguments["use_gradient_checkpointing"] = draw(st.booleans())
    if draw(st.booleans()):
        inner = st.fixed_dictionaries(
            {}, optional={"use_reentrant": st.booleans(), "preserve_rng_state": st.booleans()}
        )
        arguments["gradient_checkpointing_kwargs"] = draw(st.one_of(st.none(), inner))
    return arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A case as plain data: a recipe, or the name of a model that was asked for, and how it is quantized and run."""

    model: Data | str
    quant: str
    checkpointing: Checkpointing
    seed: int = 0

    @property
    def toml(self) -> str:
        """The recipe as a file; empty where a named model was asked for."""
        return "" if isinstance(self.model, str) else recipes_of.text(self.model)

    def spec(self, model: str, implementation: str, **options: Any) -> CaseSpec:
        """The case, with the recipe under the name ``model``."""
        return CaseSpec(
            model=model,
            quant=self.quant,
            implementation=implementation,
            checkpointing=self.checkpointing,
            **{**options, "seed": self.seed},
        )


@st.composite
def cases(
    draw: Draw,
    *,
    models: Sequence[str] = (),
    quants: Sequence[str] = (),
    checkpointing: Sequence[Checkpointing] = (),
) -> Drawn:
    """A case; what is named is chosen from, everything else is drawn."""
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
