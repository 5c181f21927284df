"""What training a model will take, predicted from its configuration alone."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
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
from kbitcheck.models.inputs.audio import audio_beside_text
from kbitcheck.models.inputs.images import counted_features
from kbitcheck.models.inputs.text import draw, widened
from kbitcheck.models.sources.resolve import Source
from kbitcheck.observe import device as devices
from kbitcheck.observe import internals
from kbitcheck.observe.forecast import weights
from kbitcheck.observe.forecast.activations import Measured, measure
from kbitcheck.observe.forecast.attention import AMPERE
from kbitcheck.observe.forecast.fake_tensors import World
from kbitcheck.observe.forecast.losses import LOSSES, Headless
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.search import Search
from kbitcheck.observe.forecast.thinning import thin
from kbitcheck.observe.probes import adapters as adapter_probe
from kbitcheck.observe.probes.treatment import PEFT

BATCH, SEQ_LEN, SHORT = 1, 2048, 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Where configurations say how many tokens a model takes: most, Whisper's, MPT's.
LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
NOTES = {
    "flash_attention_2": "flash_attention_2 is not run: it keeps queries, keys, values, results and a sum for each query",
    "chunked": "the loss is of chunks of 512 tokens from head to loss, each recomputed in the backward",
    "fused": "the loss is Liger's fused linear cross-entropy; its other kernels, which use_liger_kernel=True adds, hold less still",
}
# What a model's code raises without numbers; some assert what they read.
NO_STEP = (UsageError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)
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
        self._drawn: dict[tuple[int, int], Mapping[str, Tensor]] = {}
        self.image_tokens = 0
        _choose_attention(model, spec.attention, runtime)
        self._steps: dict[object, Measured] = {}
        targets = adapter_probe.target_layers(model, spec.targets)
        # From the second of several batches on, gradients are there all the time.
        kept = of_weights(model, facts, spec).adapters if spec.accumulate > 1 else 0
        self._biased = any(layer.bias is not None for _, layer in backends.quantized_layers(model))
        self._settled_for: object = self
        self._blocks = sum(map(is_block, model.modules()))
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
        self._audio: Callable[..., Mapping[str, Tensor]] | None = None
        try:
            self._count_image_tokens()
        except (UsageError, AttributeError):  # no layout that every model of its kind reads
            self._audio = next(self._fitting_audio(), None)
            if self._audio is None:
                raise
        self.limit = max(token_limit(model) - self.image_tokens, 1)

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
        tensors = self._packed(batch, length) if runtime.packed else self._batch(batch, length, padded)
        runtime = dataclasses.replace(runtime, packed=runtime.packed and batch > 1)
        if self._biased and runtime.autocast != self._settled_for:
            self._settled_for = runtime.autocast  # the first step casts biases for good
            self._measured(1, min(length, SHORT), mode, dataclasses.replace(runtime, packed=False), padded=False)
        headless = Headless(self._model, runtime.loss) if runtime.loss in LOSSES else None
        with headless.installed() if headless else nullcontext():
            step = self._measure(tensors, runtime=runtime, reentrant=MODES[mode])
        eager = {"eager": self._blocks} if internals.attention(self._model.config) == "eager" else {}
        logits = headless.logits if headless else step.logits
        return dataclasses.replace(step, logits=logits, attention=step.attention or eager)

    def beyond(self, length: int) -> Iterator[str]:
        """A remark if so many tokens are more than the model takes."""
        if length > self.limit:
            yield f"{length:,} tokens are more than the {self.limit:,} that the model's configuration allows"

    def search(self, limit: int, runtime: Runtime | None = None) -> Search:
        """The largest steps that fit, of at most ``limit`` tokens, in this runtime or in another."""
        return Search(partial(self.step, padded=False, runtime=runtime), limit)

    def _packed(self, batch: int, length: int) -> Mapping[str, Tensor]:
        """Sequences in one row, without a mask, whose positions begin anew with each."""
        tensors = self._batch(1, length, padded=False)
        if {t.shape for t in tensors.values()} != {(1, length)}:
            raise UsageError(f"--packed: {type(self._model).__name__} reads more than one row of tokens")
        row = {name: torch.empty(1, batch * length, dtype=t.dtype, device="meta") for name, t in tensors.items()}
        return {**row, "position_ids": row["input_ids"]}

    def _batch(self, batch: int, length: int, padded: bool) -> Mapping[str, Tensor]:
        """Shapes of inputs: those of at most two sequences are drawn, and more are widened from them."""
        rows = min(batch, 2)
        if (rows, length) not in self._drawn:
            self._drawn[rows, length] = self._draw(rows, length)
        tensors = widened(self._drawn[rows, length], batch)
        if not padded:  # a mask of ones, which models leave out when they see that it is one
            tensors.pop("attention_mask", None)
        return tensors

    def _count_image_tokens(self) -> None:
        """Draw as many tokens for an image from now on as the model computes features of it, in a step of no matter what."""
        batch = self._batch(1, SHORT, padded=False)
        if "pixel_values" in batch and "input_ids" in batch:
            with counted_features(self._model) as numbers:
                self._measure(batch, runtime=dataclasses.replace(self.runtime, packed=False), reentrant=None)
            self.image_tokens = numbers[-1] if numbers else batch["input_ids"].shape[1] - SHORT
            self._drawn.clear()
            self.notes = (*self.notes, f"each sequence has an image of {self.image_tokens:,} tokens beside its text")

    def _fitting_audio(self) -> Iterator[Callable[..., Mapping[str, Tensor]]]:
        """The layouts of audio beside a text that the model computes a step of."""
        for make in audio_beside_text(self._model):
            with suppress(*NO_STEP):
                batch = make(self._model, batch=1, seq_len=SHORT, seed=self._spec.seed)
                self._measure(batch, runtime=dataclasses.replace(self.runtime, packed=False), reentrant=None)
                yield make

    def _draw(self, batch: int, length: int) -> Mapping[str, Tensor]:
        if self._audio is not None:
            return self._audio(self._model, batch=batch, seq_len=length, seed=self._spec.seed)
        try:
            # Drawn, not chosen by a run, as a source's are: kernels would read and write memory that fake tensors lack.
            count = self.image_tokens or None
            return draw(self._model, batch=batch, seq_len=length, seed=self._spec.seed, image_tokens=count)
        except UsageError as error:
            if not {"pixel_values", "input_ids"} <= inspect.signature(type(self._model).forward).parameters.keys():
                raise
            self.notes = tuple(dict.fromkeys((*self.notes, f"activations of text alone: {error}")))
            ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
            return {"input_ids": ids, "attention_mask": ids, "labels": ids}

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
