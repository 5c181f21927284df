"""What training a model will take, predicted from its configuration alone."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from kbitcheck_reference import prepare, upcast
from torch import Tensor, nn

from kbitcheck import backends
from kbitcheck.core import memory_sizes
from kbitcheck.core.adapters import fields as adapter_fields
from kbitcheck.core.anatomy import norm_parameters
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError, is_own
from kbitcheck.core.facts import ForecastFacts, ModelFacts
from kbitcheck.core.profile import PROMISES
from kbitcheck.models.blocks import is_block
from kbitcheck.models.sources.resolve import Source
from kbitcheck.observe import device as devices
from kbitcheck.observe import internals
from kbitcheck.observe.forecast import weights
from kbitcheck.observe.forecast.activations import Measured, called, measure
from kbitcheck.observe.forecast.attention import AMPERE
from kbitcheck.observe.forecast.fake_tensors import World
from kbitcheck.observe.forecast.feed import SHORT, Feed, Runs
from kbitcheck.observe.forecast.losses import LOSSES, Headless
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.search import Search
from kbitcheck.observe.forecast.thinning import thin
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes.treatment import PEFT

BATCH, SEQ_LEN = 1, 2048
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Where configurations say how many tokens a model takes: most, Whisper's, MPT's.
LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
NOTES = {
    "flash_attention_2": "flash_attention_2 is not run: it keeps queries, keys, values, results and a sum for each query",
    "chunked": "the loss is of chunks of 512 tokens from head to loss, each recomputed in the backward",
    "fused": "the loss is Liger's fused linear cross-entropy; its other kernels, which use_liger_kernel=True adds, hold less still",
}
MODES: Mapping[str, bool | None] = {"off": None, "reentrant": True, "non-reentrant": False}


def raise_if_own(error: BaseException) -> None:
    """Raise an assertion of kbitcheck's own again, which no model failed."""
    if isinstance(error, AssertionError) and is_own(error):
        raise error


def default_mode(implementation: str) -> str:
    """The mode of a call that names none: PEFT passes none on, and torch's is reentrant (docs/findings/peft_implicit_reentrant.py)."""
    return "reentrant" if PEFT.match(implementation) else "non-reentrant"


def of_weights(model: Any, facts: ModelFacts, spec: CaseSpec, notes: tuple[str, ...] = ()) -> ForecastFacts:
    """Bytes of weights, adapters and optimizer of a model on the meta device, whose snapshot is ``facts``.

    ``notes`` are remarks on the weights themselves. A model without quantized layers gets no adapters.
    """
    targets = adapter_probe.target_layers(model, spec.targets) if facts.takes_adapters else []
    sizes = {
        f"{name}.{end}": spec.rank * width
        for name, layer in ((name, facts.layers[name]) for name in targets)
        for end, width in (("A", layer.experts * layer.in_features), ("B", layer.out_features))
    }
    return ForecastFacts(
        groups=weights.groups(model, facts),
        profile=spec.profile,
        trainable=sum(sizes.values()),
        adapters=4 * sum(sizes.values()),
        optimizer=memory_sizes.optimizers(sizes),
        device="cpu" if spec.device == "cpu" else "cuda",
        mode=default_mode(spec.implementation) if spec.checkpointing == "default" else spec.checkpointing,
        memory=spec.memory,
        chosen=spec.optimizer,
        accumulate=spec.accumulate,
        gpus=spec.gpus,
        notes=notes,
    )


def runtime_of(spec: CaseSpec, device: Literal["cpu", "cuda"]) -> Runtime:
    """How the case's steps run: on the GPU that the case names, the one that is here, or one of Ampere's generation.

    Autocast is that of transformers' ``Trainer(bf16=True)``; in float16 where the GPU has no bfloat16.
    """
    capability = memory_sizes.CAPABILITIES.get(spec.gpu) or devices.capability(spec.device) or AMPERE
    if spec.autocast == "none" and PROMISES[spec.profile].autocast:
        raise UsageError(f"profile {spec.profile} mixes dtypes, which only autocast can run: leave out --autocast none")
    plain = Runtime(device=device, capability=capability, packed=spec.packed, loss=spec.loss)
    half = {"default": usual_half(plain), "none": None}
    return dataclasses.replace(plain, autocast=half[spec.autocast] if spec.autocast in half else DTYPES[spec.autocast])


def _choose_attention(model: Any, name: str, runtime: Runtime) -> None:
    if name == "default":
        return
    if not internals.attention_is_supported(model, name):
        raise UsageError(f"--attention {name}: {type(model).__name__} does not support it")
    if name == "flash_attention_2" and (runtime.device != "cuda" or runtime.capability < AMPERE):
        raise UsageError(f"--attention {name} needs a GPU of Ampere's generation or later")
    internals.choose_attention(model.config, name)


def usual_half(runtime: Runtime) -> torch.dtype:
    """The dtype that people train in: bfloat16 where the device has it."""
    return torch.float16 if runtime.device == "cuda" and runtime.capability < AMPERE else torch.bfloat16


def autocast_name(runtime: Runtime) -> str:
    """``bf16``, ``fp16`` or ``none``."""
    return next((name for name, dtype in DTYPES.items() if dtype == runtime.autocast), "none")


class Training:
    """A model on the meta device, prepared, with adapters, whose training steps are measured without numbers.

    There is no key/value cache, as transformers' Trainer switches ``use_cache`` off.
    """

    def __init__(self, source: Source, model: Any, facts: ModelFacts, spec: CaseSpec, runtime: Runtime) -> None:
        self._model, self._spec, self.runtime = model, spec, runtime
        self.rows: int = getattr(source, "rows", BATCH)
        self.length: int = getattr(source, "seq_len", SEQ_LEN)
        self.notes: tuple[str, ...] = tuple(
            note for stated, note in NOTES.items() if stated in (spec.attention, spec.loss)
        )
        if adapter_fields(spec.adapters) is not None:
            self.notes += (f"adapters are forecast as a plain LoRA of rank {spec.rank}",)
        _choose_attention(model, spec.attention, runtime)
        self._steps: dict[object, Measured] = {}
        targets = adapter_probe.target_layers(model, spec.targets)
        # From the second of several batches on, gradients are there all the time.
        kept = of_weights(model, facts, spec).adapters if spec.accumulate > 1 else 0
        self._biased = any(layer.bias is not None for _, layer in backends.quantized_layers(model))
        self._settled_for: object = self
        self._eager = _eager(model)
        thin(model)
        self.checkpoints = self._prepare(model, facts, spec)
        names = dict(model.named_modules())
        wrapped, _ = adapter_probe.attach(
            model, [t for t in targets if t in names], library=spec.adapters, rank=spec.rank, seed=spec.seed
        )
        world = World()
        world.move(wrapped)
        wrapped.train()
        self._measure = partial(measure, wrapped, world=world, accumulated=kept)
        plain = dataclasses.replace(runtime, packed=False)
        runs = Runs(
            step=lambda batch: self._measure(batch, runtime=plain, reentrant=None),
            call=lambda function: called(function, wrapped, world, plain),
        )
        self._feed = Feed(model, runs, seed=spec.seed, width=spec.image_size)
        self.notes += self._feed.notes
        self.limit = max(token_limit(model) - self._feed.tokens, 1)

    def step(
        self, batch: int, length: int, mode: str, *, padded: bool = True, runtime: Runtime | None = None
    ) -> Measured:
        """One step of ``batch`` sequences of ``length`` tokens under a mode of ``MODES``; ``padded`` ones have a mask."""
        padded, runtime = padded and batch > 1, runtime or self.runtime
        shape = batch, length, mode, padded, runtime
        if shape not in self._steps:
            self._steps[shape] = self._measured(batch, length, mode, runtime, padded=padded)
        return self._steps[shape]

    def _measured(self, batch: int, length: int, mode: str, runtime: Runtime, *, padded: bool) -> Measured:
        tensors = self._packed(batch, length) if runtime.packed else self._feed.batch(batch, length, padded=padded)
        runtime = dataclasses.replace(runtime, packed=runtime.packed and batch > 1)
        if self._biased and runtime.autocast != self._settled_for:
            self._settled_for = runtime.autocast  # the first step casts biases for good
            self._measured(1, min(length, SHORT), mode, dataclasses.replace(runtime, packed=False), padded=False)
        headless = Headless(self._model, runtime.loss) if runtime.loss in LOSSES else None
        with headless.installed() if headless else nullcontext():
            step = self._measure(tensors, runtime=runtime, reentrant=MODES[mode])
        logits = headless.logits if headless else step.logits
        return dataclasses.replace(step, logits=logits, attention={**step.attention, **self._eager})

    def beyond(self, length: int) -> Iterator[str]:
        """A remark if so many tokens are more than the model takes."""
        if length > self.limit:
            yield f"{length:,} tokens are more than the {self.limit:,} that the model's configuration allows"

    def search(self, limit: int, runtime: Runtime | None = None) -> Search:
        """The largest steps that fit, of at most ``limit`` tokens, in this runtime or in another."""
        return Search(partial(self.step, padded=False, runtime=runtime), limit)

    def _packed(self, batch: int, length: int) -> Mapping[str, Tensor]:
        """Sequences in one row, without a mask, whose positions begin anew with each."""
        tensors = self._feed.batch(1, length, padded=False)
        if {t.shape for t in tensors.values()} != {(1, length)}:
            raise UsageError(f"--packed: {type(self._model).__name__} reads more than one row of tokens")
        row = {name: torch.empty(1, batch * length, dtype=t.dtype, device="meta") for name, t in tensors.items()}
        return {**row, "position_ids": row["input_ids"]}

    @staticmethod
    def _prepare(model: nn.Module, facts: ModelFacts, spec: CaseSpec) -> bool:
        """Prepare as the profile demands; whether the model can checkpoint."""
        try:
            parts = prepare.checkpointable_parts(model)
        except ValueError:
            parts = []
        prepare.freeze_base(model)
        norms, promise = norm_parameters(facts), PROMISES[spec.profile]
        wide = {id(p) for n, p in model.named_parameters() if promise.casts(norm=n in norms)}
        upcast.upcast(p for p in upcast.castable_parameters(model) if id(p) in wide)
        if spec.checkpointing != "off":
            prepare.make_inputs_require_grad(parts)
        return bool(parts)


def _eager(model: Any) -> dict[str, int]:
    """How many blocks attend without a kernel: a model's parts may differ, as some compute what no kernel does."""
    blocks = [block for block in model.modules() if is_block(block)]
    configs = [[getattr(m, "config", None) for m in b.modules() if "Attention" in type(m).__name__] for b in blocks]
    eager = sum(any(c is not None and internals.attention(c) == "eager" for c in of_block) for of_block in configs)
    if (
        not any(map(any, configs)) and internals.attention(model.config) == "eager"
    ):  # their attention has no configuration
        eager = len(blocks)
    return {"eager": eager} if eager else {}


def token_limit(model: Any) -> int:
    """The most tokens that the model's own configuration allows.

    A table of positions that has a row for padding, as RoBERTa's, numbers tokens from behind that row on.
    """
    text = model.config.get_text_config()
    stated = (getattr(text, name, None) for name in LIMITS)
    limits = [n for n in stated if isinstance(n, int) and n > 0]
    tables = (m for name, m in model.named_modules() if "position" in name and isinstance(m, torch.nn.Embedding))
    limits += [table.num_embeddings - table.padding_idx - 1 for table in tables if table.padding_idx is not None]
    return min(limits, default=1 << 20)
