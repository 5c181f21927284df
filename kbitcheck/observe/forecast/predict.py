"""What training a model will take, predicted from its configuration alone."""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from kbitcheck_reference import prepare, upcast
from torch import Tensor, nn

from kbitcheck.core import memory_sizes
from kbitcheck.core.anatomy import norm_parameters
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import UsageError, cause
from kbitcheck.core.facts import ForecastFacts, HeldFacts, ModelFacts
from kbitcheck.core.profile import PROMISES
from kbitcheck.models.inputs.text import draw, widened
from kbitcheck.models.sources.resolve import Source
from kbitcheck.observe import device as devices
from kbitcheck.observe.forecast import weights
from kbitcheck.observe.forecast.activations import Measured, measure
from kbitcheck.observe.forecast.attention import AMPERE
from kbitcheck.observe.forecast.fake_tensors import World
from kbitcheck.observe.forecast.runtime import Runtime
from kbitcheck.observe.forecast.search import USUAL, Search
from kbitcheck.observe.forecast.thinning import thin
from kbitcheck.observe.probes import adapters as adapter_probe

BATCH, SEQ_LEN = 1, 2048
# PEFT however it is named (peft, peft==0.13.2, peft:function, peft.utils:function), and no file peft.py.
PEFT = re.compile(r"peft(?![\w-]|\.py\b)")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODES: Mapping[str, bool | None] = {"off": None, "reentrant": True, "non-reentrant": False}


def default_mode(implementation: str) -> str:
    """The mode of a call that names none: PEFT passes none on, and torch's is reentrant (docs/findings/peft_implicit_reentrant.py)."""
    return "reentrant" if PEFT.match(implementation) else "non-reentrant"


def of_weights(model: Any, facts: ModelFacts, spec: CaseSpec, notes: tuple[str, ...] = ()) -> ForecastFacts:
    """Bytes of weights, adapters and optimizer of a model on the meta device, whose snapshot is ``facts``.

    ``notes`` are remarks on the weights themselves. A model without quantized layers gets no adapters.
    """
    targets = adapter_probe.target_layers(model, spec.targets) if facts.layers else []
    sizes = {
        f"{name}.{end}": spec.rank * width
        for name in targets
        for end, width in (("A", facts.layers[name].in_features), ("B", facts.layers[name].out_features))
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
        notes=notes,
    )


def with_steps(forecast: ForecastFacts, source: Source, model: Any, facts: ModelFacts, spec: CaseSpec) -> ForecastFacts:
    """The same with training steps predicted, and what fits; ``missing`` is why no step is predicted. Uses up the model."""
    limit = _limit(model)
    if not facts.layers:
        return dataclasses.replace(forecast, missing="no layer is quantized, so that there are no adapters to train")
    try:
        runtime = runtime_of(spec, "cpu" if forecast.device == "cpu" else "cuda")
        run = Training(source, model, facts, spec, runtime)
        batch, length = spec.batch or run.rows, spec.seq_len or min(run.length, limit)
        mode = forecast.mode if run.checkpoints else "off"
        steps = {m: run.step(batch, length, m) for m in dict.fromkeys(("off", mode))}
        other = dataclasses.replace(runtime, autocast=_usual_half(runtime) if runtime.autocast is None else None)
        compared = {runtime: steps[mode], other: run.step(batch, length, mode, runtime=other)}
        taken = forecast.resident + max(steps[mode].peak, forecast.adapters)
        # What fits any GPU many times is not searched for, unless there is a size to fit.
        tiny = forecast.memory is None and 100 * taken < min(memory_sizes.GPUS)
        fitting = {} if tiny else _fitting(run.search(limit), forecast, length, mode)
    except (UsageError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return dataclasses.replace(forecast, missing=cause(error))
    named = memory_sizes.named(forecast.memory)
    return dataclasses.replace(
        forecast,
        batch=batch,
        seq_len=length,
        mode=mode,
        activations={m: HeldFacts(held=s.held, peak=s.peak) for m, s in steps.items()},
        logits=steps[mode].logits,
        autocast=_name(runtime),
        compared={_name(r): HeldFacts(held=s.held, peak=s.peak) for r, s in compared.items() if r is not runtime},
        attention={_name(r): s.attention for r, s in compared.items()},
        limit=limit,
        rooms={size: name for size, name in named.items() if not fitting or size in fitting["longest"]},
        notes=(*forecast.notes, *run.notes),
        **fitting,
    )


def _fitting(search: Search, forecast: ForecastFacts, length: int, mode: str) -> dict[str, Any]:
    """What fits by size of memory, by the names of ``ForecastFacts``: into the requested size, or into the common GPUs."""
    sizes = [forecast.memory] if forecast.memory else list(memory_sizes.GPUS)
    rooms = {size: size - forecast.resident for size in sizes}
    lengths = dict.fromkeys((length, *(n for n in USUAL if n <= search.limit)))
    largest = {n: {s: search.largest_batch(n, room, mode).number for s, room in rooms.items()} for n in lengths}
    return {
        "largest_batch": largest[length],
        "usual": {n: largest[n] for n in USUAL if n in largest},
        "longest": {size: search.longest(room, mode).number for size, room in rooms.items()},
    }


def runtime_of(spec: CaseSpec, device: Literal["cpu", "cuda"]) -> Runtime:
    """How the case's steps run: on the GPU that the case names, the one that is here, or one of Ampere's generation.

    Autocast is that of transformers' ``Trainer(bf16=True)``; in float16 where the GPU has no bfloat16.
    """
    capability = memory_sizes.CAPABILITIES.get(spec.gpu) or devices.capability(spec.device) or AMPERE
    plain = Runtime(device=device, capability=capability)
    half = {"default": _usual_half(plain), "none": None}
    return dataclasses.replace(plain, autocast=half[spec.autocast] if spec.autocast in half else DTYPES[spec.autocast])


def _usual_half(runtime: Runtime) -> torch.dtype:
    return torch.float16 if runtime.device == "cuda" and runtime.capability < AMPERE else torch.bfloat16


def _name(runtime: Runtime) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == runtime.autocast), "none")


class Training:
    """A model on the meta device, prepared, with adapters, whose training steps are measured without numbers.

    There is no key/value cache, as transformers' Trainer switches ``use_cache`` off.
    """

    def __init__(self, source: Source, model: Any, facts: ModelFacts, spec: CaseSpec, runtime: Runtime) -> None:
        self._model, self._spec, self.runtime = model, spec, runtime
        self.rows: int = getattr(source, "rows", BATCH)
        self.length: int = getattr(source, "seq_len", SEQ_LEN)
        self.notes: tuple[str, ...] = ()
        self._drawn: dict[tuple[int, int], Mapping[str, Tensor]] = {}
        targets = adapter_probe.target_layers(model, spec.targets)
        thin(model)
        self.checkpoints = self._prepare(model, facts, spec)
        names = dict(model.named_modules())
        wrapped, _ = adapter_probe.attach(
            model, [t for t in targets if t in names], library=spec.adapters, rank=spec.rank, seed=spec.seed
        )
        world = World()
        world.move(wrapped)
        wrapped.train()
        self._measure = partial(measure, wrapped, world=world)

    def step(
        self, batch: int, length: int, mode: str, *, padded: bool = True, runtime: Runtime | None = None
    ) -> Measured:
        """One step of ``batch`` sequences of ``length`` tokens under a mode of ``MODES``; ``padded`` ones have a mask."""
        tensors = self._batch(batch, length, padded and batch > 1)
        return self._measure(tensors, runtime=runtime or self.runtime, reentrant=MODES[mode])

    def search(self, limit: int, runtime: Runtime | None = None) -> Search:
        """The largest steps that fit, of at most ``limit`` tokens, in this runtime or in another."""
        return Search(partial(self.step, padded=False, runtime=runtime), limit)

    def _batch(self, batch: int, length: int, padded: bool) -> Mapping[str, Tensor]:
        """Shapes of inputs: those of at most two sequences are drawn, and more are widened from them."""
        rows = min(batch, 2)
        if (rows, length) not in self._drawn:
            self._drawn[rows, length] = self._draw(rows, length)
        tensors = widened(self._drawn[rows, length], batch)
        if not padded:  # a mask of ones, which models leave out when they see that it is one
            tensors.pop("attention_mask", None)
        return tensors

    def _draw(self, batch: int, length: int) -> Mapping[str, Tensor]:
        try:
            # Drawn, not chosen by a run, as a source's are: kernels would read and write memory that fake tensors lack.
            return draw(self._model, batch=batch, seq_len=length, seed=self._spec.seed)
        except UsageError as error:
            if not hasattr(self._model.config, "vision_config"):
                raise
            self.notes = (f"activations of text alone: {error}",)
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


def _limit(model: Any) -> int:
    """The most tokens that the model's own configuration allows."""
    text = model.config.get_text_config()
    stated = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    return min((n for n in stated if isinstance(n, int) and n > 0), default=1 << 20)
