"""What the forecast says fits is confirmed for every architecture, by steps in which no block is left out."""

import dataclasses

import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.sources import architecture
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe import internals
from kbitcheck.observe.forecast import predict
from kbitcheck.observe.forecast.feed import NO_STEP
from kbitcheck.observe.forecast.results import Results
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.thinning import Passed
from kbitcheck.observe.probes.snapshot import snapshot

NF4 = Quantization.parse("nf4")
AUTOCAST = Runtime(autocast=torch.bfloat16)
LENGTH = 24
ROOM = 5  # times what two sequences take
TASKS = (architecture.CAUSAL_LM, "seq2seq-lm", "speech-seq2seq")

KINDS = {
    "dense": "llama",
    "sliding window": "mistral",
    "alternating windows": "gemma3_text",
    "chunked attention": "llama4_text",
    "experts": "mixtral",
    "state space": "mamba2",
    "hybrid": "bamba",
    "code that asks whether it is quantized": "jamba",
    "linear attention": "qwen3_next",
    "learned positions": "gpt2",
    "encoder-decoder": "seq2seq-lm/t5",
    "speech": "speech-seq2seq/whisper",
}


def source_of(name):
    return resolve(f"arch:{name}")


def training(source, *, whole=False):
    """Steps of a model, with torch's attention where the model has it, and whether every block runs; ``whole``: it does."""
    spec = CaseSpec(model=source.name, quant="nf4", implementation="none", device="auto")
    model = source.meta(NF4)
    if internals.attention_is_supported(model, "sdpa"):
        spec = dataclasses.replace(spec, attention="sdpa")
    with pytest.MonkeyPatch.context() as patch:
        if whole:
            patch.setattr(predict, "thin", lambda model: None)
        return predict.Training(source, model, snapshot(model), spec, AUTOCAST), not any(
            isinstance(m, Passed) for m in model.modules()
        )


def shape(source, thinned):
    """The most tokens that a model takes, the tokens of its steps here, and their mode of checkpointing."""
    limit = predict.token_limit(source.meta(NF4))
    return limit, min(LENGTH, limit), "reentrant" if thinned.checkpoints else "off"


def first_step(source, thinned):
    _, length, mode = shape(source, thinned)
    return thinned.step(2, length, mode, padded=False)


def confirm(source, thinned, same, questions=("batch", "length")):
    """Search the largest batch and the longest sequence, and run what was answered, and the next, again on the whole model."""
    whole = thinned if same else training(source, whole=True)[0]
    limit, length, mode = shape(source, thinned)
    search = thinned.search(limit)
    room = ROOM * search.step(2, length, mode).peak

    def peak(batch, tokens):
        return whole.step(batch, tokens, mode, padded=False).peak

    if "batch" in questions:
        batch = search.largest_batch(length, room, mode)
        assert 1 < batch.number < 100
        assert batch.peak == peak(batch.number, length) <= room < peak(batch.number + 1, length)
    if "length" in questions:
        longest = search.longest(room, mode)
        assert longest.peak == peak(1, longest.number) <= room
        assert longest.number == limit if longest.limit == "model" else room < peak(1, longest.number + 1)
    shapes = [(batch, tokens) for batch, tokens, _ in search.measured]
    for rising in ([s for s in shapes if s[1] == length and s[0] > 1], [s for s in shapes if s[0] == 1]):
        peaks = [search.step(*shape, mode).peak for shape in sorted(rising)]
        assert peaks == sorted(peaks)


SOME = ("learned positions",)  # test_storages.py has blocks of two kinds


IN_5 = pytest.mark.transformers5("has no step without numbers before")
MARKS = {"chunked attention": [IN_5], "speech": [IN_5]}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=kind, marks=MARKS.get(kind, []) if kind in SOME else pytest.mark.slow)
        for kind, name in KINDS.items()
    ],
)
def test_what_fits_is_confirmed_for_each_kind_of_layer(name):
    source = source_of(name)
    thinned, same = training(source)
    confirm(source, thinned, same)
    infer_each_operator(source, thinned)


def infer_each_operator(source, thinned):
    """The same step anew, and in a world that takes no result of an operator from another call, is the same at every place."""
    _, length, mode = shape(source, thinned)
    first = first_step(source, thinned)
    fresh, _ = training(source)
    again = [thinned._measured(2, length, mode, AUTOCAST, padded=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "of", lambda self, func, args, kwargs, infer: infer())
        again.append(fresh._measured(2, length, mode, AUTOCAST, padded=False))
    for step in again:
        assert step.places == first.places
        assert (step.log.nbytes, step.log.events) == (first.log.nbytes, first.log.events)


# A pattern of what each raises: it has no step without numbers, or not one of every length. A report says ``missing`` and that.
# Those that compute with packed weights (``torch.uint8``), or write into a leaf, do not train with numbers either.
NOT_FORECAST = {
    "causal-lm/blt": "a leaf Variable that requires grad",
    "causal-lm/gemma3n": "timm",
    "causal-lm/gemma3n_text": "dtype torch.uint8",
    "causal-lm/gemma4_assistant": "cannot be loaded",
    "causal-lm/gemma4_unified_assistant": "computes no loss",
    "causal-lm/git": "a leaf Variable that requires grad",
    "causal-lm/jetmoe": "split_with_sizes",
    "causal-lm/longcat_flash": "same reduction dim",
    "causal-lm/mamba": "torch.uint8",
    "causal-lm/xlstm": "is not divisible by chunk size",
    "causal-lm/xmod": "aten.nonzero",
    "seq2seq-lm/fsmt": "to match target batch_size",
    "seq2seq-lm/led": "is invalid for input of size",
    "seq2seq-lm/longt5": "torch.uint8",
    "seq2seq-lm/nllb-moe": "Params4bit|swap Linear4bit.weight",
    "seq2seq-lm/prophetnet": "shifted_input_ids",
    "seq2seq-lm/switch_transformers": "Params4bit|swap Linear4bit.weight",
    "seq2seq-lm/voxtral_realtime": "exactly one of input_features",
    "speech-seq2seq/dia": "to match target batch_size",
    "speech-seq2seq/kyutai_speech_to_text": "broadcast a dimension",
    "speech-seq2seq/speech-encoder-decoder": "no batch can be made",
    "speech-seq2seq/speecht5": "no batch can be made",
    "speech-seq2seq/voxtral_realtime": "exactly one of input_features",
}
NO_QUANTIZED_LAYER = "causal-lm/falcon"


def answer(name):
    """One of the two questions: by the length of the name, which over two hundred of them is as good as chance."""
    source = source_of(name)
    thinned, same = training(source)
    confirm(source, thinned, same, ("batch", "length")[len(name) % 2 :][:1])


@pytest.mark.slow
@pytest.mark.transformers5("another has other architectures")
@pytest.mark.parametrize("name", [f"{task}/{kind}" for task in TASKS for kind in sorted(architecture.listed(task))])
def test_what_fits_is_confirmed_for_every_architecture(name):
    if name == NO_QUANTIZED_LAYER:
        assert not snapshot(source_of(name).meta(NF4)).layers
    elif name in NOT_FORECAST:
        with pytest.raises(NO_STEP, match=NOT_FORECAST[name]):
            answer(name)
    else:
        answer(name)
