"""KB802 and KB909 to KB913: what is quantized, as what, and whether it can train."""

import re
from collections.abc import Iterable, Iterator

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts, ModelFacts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule

LINEAR = frozenset({"Linear", "Conv1D"})
PATTERN = re.compile(r"[*+?\[\](){}|^$\\]")  # what makes a name in a skip list a pattern
HEADS = frozenset({"lm_head", "score", "classifier", "qa_outputs", "proj_out"})
ROUTERS = frozenset({"gate", "router"})
NORM = re.compile(r"(^|\.)\w*norm\d*\.\w+$", re.IGNORECASE)  # right inside a norm, or inside what is called one
FRONT = re.compile(
    r"(^|[._])(conv\d*|conv_\w+|patch_?embed(s|ding|dings|der)?|patch_(dense|projection)|vision_embed_tokens)(\.|$)",
    re.IGNORECASE,
)

BY_TRANSFORMERS = "the installed transformers' own reading of the list"


def _of_model(where: str, expected: str, actual: str, witness: str, *, ok: bool) -> Observation:
    return Observation(where, expected, actual, ok=ok, party=Party.MODEL, witness=witness)


@rule("KB802", "no-zero-rows", Level.INFO)
def no_zero_rows(facts: Facts) -> Iterable[Observation]:
    """No row of an unpacked weight has a norm that is zero or subnormal.

    Why: adapters with magnitudes, such as DoRA, divide each row by its norm.
    Symptom: NaN in the first step with ``use_dora=True``; the same model trains with plain LoRA.
    Fix: leave these layers out of the targets of such adapters, or quantize them in another scheme.
    Sources: DoRA (arXiv 2402.09353), section 4.
    """
    layers = [layer for layer in facts.base.layers.values() if layer.zero_rows is not None]
    if not layers:
        raise NotApplicable("no quantized weight has numbers to look at")
    for layer in layers:
        actual = f"{layer.zero_rows} of {layer.out_features} rows are zero"
        yield _of_model(layer.name, "no row of norm zero", actual, "the unpacked weight", ok=not layer.zero_rows)


@rule("KB909", "skip-list-honoured", Level.SHOULD)
def skip_list_honoured(facts: Facts) -> Iterable[Observation]:
    """What was requested to stay unquantized does, with all that is in it, and no other linear layer does for its name's sake.

    A requested name stands for every module of this name. Names that are patterns are not judged. Of a checkpoint that is
    quantized already the list is its own (``modules_to_not_convert``), and what is judged is how the installed transformers reads it.

    Why: transformers 5 reads such lists otherwise than 4 did: a name matches from the beginning of a module's path, or at its
    end. ``vision_tower`` no longer matches ``model.vision_tower.encoder``, and ``proj`` skips every ``o_proj``.
    Symptom: a vision tower that is quantized although it was listed, or a "4-bit" model that is hardly smaller; of a checkpoint,
    weights that are reported missing, or a tower with random weights.
    Fix: write the whole path, ``model.vision_tower``, or a pattern, ``.*vision_tower``; of a checkpoint into its ``config.json``.
    Sources: transformers#42455, transformers#42711, unsloth#4208.
    """
    base = facts.base
    if facts.quantizer.left_out:
        yield from _list_of_checkpoint(facts)
        return
    named = [name for name in facts.quantizer.skip if not PATTERN.search(name)]
    if not named:
        raise NotApplicable("no module was requested by name to stay unquantized")
    for name in named:
        yield Observation(name, "stays unquantized", "looked for", ok=True)
        for layer in base.layers:
            if f".{name}." in f".{layer}.":
                yield _of_model(layer, f"unquantized, as skip={name} says", "quantized", "its type", ok=False)
    for module in base.modules.values():
        cause = next((n for n in named if module.name.endswith(n)), "")
        requested = any(f".{n}." in f".{module.name}." for n in named)
        if cause and not requested and module.cls in LINEAR and module.name not in base.heads:
            actual = f"left out: its name ends with {cause}"
            yield _of_model(module.name, "quantized", actual, "its type", ok=False)


def _list_of_checkpoint(facts: Facts) -> Iterator[Observation]:
    """How transformers reads a checkpoint's own list of what is not quantized."""
    named = [name for name in facts.quantizer.listed if not PATTERN.search(name)]
    yield Observation("the checkpoint's list", "read", f"{len(facts.quantizer.left_out)} layers looked at", ok=True)
    for layer, entry in facts.quantizer.left_out.items():
        requested = next((name for name in named if f".{name}." in f".{layer}."), "")
        if requested and not entry:
            expected = f"unquantized, as the checkpoint's list says ({requested})"
            yield _of_model(layer, expected, "a packed weight is looked for", BY_TRANSFORMERS, ok=False)
        elif entry and not requested and not PATTERN.search(entry) and layer not in facts.base.heads:
            actual = f"left out: its name ends with {entry}"
            yield _of_model(layer, "quantized", actual, BY_TRANSFORMERS, ok=False)


@rule("KB910", "never-quantized", Level.SHOULD)
def never_quantized(facts: Facts) -> Iterable[Observation]:
    """Routers, heads, embeddings, norms and convolutional front ends are not quantized.

    Why: they are small, and errors in them cost most: a router's choice of experts turns on small differences, and a new
    classification head is to be trained.
    Symptom: other experts than the unquantized model's; a head that cannot be trained or saved.
    Fix: name these modules in the skip list (``--quant nf4,skip=NAME``).
    Sources: axolotl#3791, unsloth-zoo#594.
    """
    base = facts.base
    if not base.layers:
        raise NotApplicable("no layer is quantized")
    yield Observation("quantized layers", "none that must not be", f"{len(base.layers)} looked at", ok=True)
    for name in base.layers:
        if part := _part(name, base):
            yield _of_model(name, "unquantized", f"quantized, and {part}", "its name and place", ok=False)


def _part(name: str, base: ModelFacts) -> str:
    """What a layer is part of that must not be quantized; empty if nothing."""
    parent, _, last = name.rpartition(".")
    if "router" in name.split(".") or (last in ROUTERS and f"{parent}.experts" in base.modules):
        return "a router"
    if name in base.heads or last in HEADS:
        return "a head"
    if name in base.embeddings:
        return "an embedding"
    if NORM.search(name):
        return "part of a norm"
    blocks = [block.name for block in base.blocks]
    outside = blocks and not any(name.startswith(f"{block}.") for block in blocks)
    return "part of a front end" if outside and FRONT.search(name) else ""


@rule("KB911", "loaded-whole", Level.MUST)
def loaded_whole(facts: Facts) -> Iterable[Observation]:
    """Each packed weight of a checkpoint is unpacked where the model has this weight, from the checkpoint's own bits.

    Why: transformers 5 makes one parameter of many tensors, as of a mixture's experts. It joins their packed bytes as if they were
    numbers, and drops the scales as unexpected keys: the experts are noise, and everything else works.
    Symptom: a load report with UNEXPECTED ``absmax`` and ``quant_state`` keys; a pre-quantized mixture of experts that answers noise, and
    a loss that starts near the logarithm of the vocabulary's size.
    Fix: quantize the original checkpoint on load, or load this one with the transformers release that saved it.
    Sources: unsloth-zoo#856, transformers' ``core_model_loading``.
    """
    checkpoint = facts.stored
    yield Observation("checkpoint", "each packed weight in its place", f"{checkpoint.states} looked at", ok=True)
    for name, why in checkpoint.lost.items():
        yield _of_stack(name, "unpacked by the scales of the checkpoint", why, "the names in the checkpoint's files")
    for name, parts in checkpoint.differing.items():
        yield _of_stack(name, "the bits of the checkpoint", f"other bits: {parts}", "the checkpoint's files")


def _of_stack(where: str, expected: str, actual: str, witness: str) -> Observation:
    return Observation(where, expected, actual, ok=False, party=Party.STACK, witness=witness)


@rule("KB912", "is-what-it-says", Level.SHOULD)
def is_what_it_says(facts: Facts) -> Iterable[Observation]:
    """The loaded model is quantized as its checkpoint or ``--quant`` says, and stays so: neither loading nor a forward unpacks it.

    Why: some quantizers unpack a checkpoint where a kernel or device is missing, and say so in a log line alone: gpt-oss in MXFP4
    becomes a model in bfloat16 of three to four times its size, and "4-bit training" of it is none. compressed-tensors has no
    kernels for training: the first forward unpacks all weights for good.
    Symptom: a model that takes far more memory than its files; out of memory while loading, or in the first forward.
    Fix: train a checkpoint of a scheme that trains, such as an unquantized one with ``--quant nf4``; or use a machine with the
    kernels, or plan for the size of the unpacked model.
    Sources: transformers#39969, axolotl#3530, ``kbitcheck backends``.
    """
    quantizer, layers = facts.quantizer, facts.base.layers
    others = {name: layer.scheme for name, layer in layers.items() if layer.scheme != quantizer.scheme}
    for name, scheme in others.items():
        yield _of_model(name, quantizer.scheme, scheme, "its type and state", ok=False)
    if quantizer.loading is not None and quantizer.loading.unpacked:
        actual = f"unpacked by {quantizer.loading.unpacked}: {quantizer.unpacked:,} bytes"
        expected = f"{quantizer.scheme}, {quantizer.packed:,} bytes" if quantizer.packed else quantizer.scheme
        yield _of_model("weights", expected, actual, "transformers' own check of this machine", ok=False)
    else:
        actual = f"{len(layers) - len(others)} layers in {quantizer.scheme}"
        yield _of_model("weights", quantizer.scheme, actual, "types and states", ok=bool(layers))


@rule("KB913", "trainable-quantizer", Level.SHOULD)
def trainable_quantizer(facts: Facts) -> Iterable[Observation]:
    """The quantizer can train, by transformers' own word, and the preparation enables checkpointing for its method.

    Why: a preparation that dispatches on the method's name does something else for names that it does not know: PEFT's function
    leaves checkpointing off for fp8, awq, mxfp4 and others, without a warning.
    Symptom: "does not support training", or out of memory in the first step although checkpointing was requested.
    Fix: choose a method that trains (``kbitcheck backends``), and call ``model.gradient_checkpointing_enable()`` yourself.
    Sources: transformers ``is_trainable``, peft ``prepare_model_for_kbit_training``.
    """
    quantizer = facts.quantizer
    if quantizer.loading is None:
        raise NotApplicable("nothing says which method quantized the model")
    method, trainable = quantizer.loading.method, quantizer.loading.trainable
    refused = trainable == "no" or trainable.startswith("needs")
    yield _of_model(method, "trains", trainable, "is_trainable of its quantizer", ok=not refused)
    yield from _enabled(facts)


def _enabled(facts: Facts) -> Iterator[Observation]:
    treatment = facts.quantizer.treatment
    if treatment is not None and facts.checkpointing != "off":
        yield Observation("the preparation", "enables checkpointing", str(treatment), ok=treatment.checkpoints)
