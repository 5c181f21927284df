"""What fits: training steps predicted, the answer for one memory size, and the table of common GPUs."""

import dataclasses
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core import memory_sizes
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import cause
from kbitcheck.core.facts import Cost, ForecastFacts, HeldFacts, ModelFacts, Passes
from kbitcheck.core.profile import PROMISES
from kbitcheck.models.sources.resolve import Source
from kbitcheck.observe.forecast import grid, parts, predict, shares
from kbitcheck.observe.forecast.answer import Answer
from kbitcheck.observe.forecast.attention import AMPERE
from kbitcheck.observe.forecast.candidate import Candidate, with_loading
from kbitcheck.observe.forecast.feed import NO_STEP
from kbitcheck.observe.forecast.predict import Training, autocast_name, runtime_of, usual_half
from kbitcheck.observe.forecast.search import USUAL

# Steps that a forecast predicts: without checkpointing, with it and under the other autocast; the largest batch and the
# longest sequence that fit, or changes until it fits; and as much for each of the common GPUs.
STEPS, ANSWER, TABLE = 3, 12, 60
ENDED_EARLY = "the model's code takes one token after another, so that a predicted step takes long: the search ended early, and more may fit"


def cost(spec: CaseSpec) -> Cost:
    """About what the forecast of a spec takes at most; nothing where it is of weights alone."""
    if spec.static == "never":
        return Cost()
    steps = STEPS + ANSWER * (spec.memory is not None) + grid.MOST * spec.cells + TABLE * spec.fits
    return Cost(passes=Passes(predicted=steps))


def with_steps(forecast: ForecastFacts, source: Source, model: Any, facts: ModelFacts, spec: CaseSpec) -> ForecastFacts:
    """The same with training steps predicted, and what fits; ``missing`` is why no step is predicted. Uses up the model."""
    forecast = with_loading(forecast, source, model, facts)
    if not facts.takes_adapters:
        return dataclasses.replace(forecast, missing="no layer is quantized, so that there are no adapters to train")
    try:
        runtime = runtime_of(spec, "cpu" if forecast.device == "cpu" else "cuda")
        run = Training(source, model, facts, spec, runtime)
        batch, length = spec.batch or run.rows, spec.seq_len or min(run.length, run.limit)
        mode = forecast.mode if run.checkpoints else "off"
        steps = {m: run.step(batch, length, m) for m in dict.fromkeys(("off", mode))}
        compared = {runtime: steps[mode]}
        if not PROMISES[spec.profile].autocast:  # else dtypes are mixed, which only autocast can run
            other = dataclasses.replace(runtime, autocast=usual_half(runtime) if runtime.autocast is None else None)
            compared[other] = run.step(batch, length, mode, runtime=other)
        forecast = dataclasses.replace(
            forecast,
            batch=batch,
            seq_len=length,
            mode=mode,
            activations={m: HeldFacts(held=s.held, peak=s.peak) for m, s in steps.items()},
            logits=steps[mode].logits,
            autocast=autocast_name(runtime),
            compared={
                autocast_name(r): HeldFacts(held=s.held, peak=s.peak) for r, s in compared.items() if r != runtime
            },
            attention={autocast_name(r): s.attention for r, s in compared.items()},
            limit=run.limit,
            notes=(*forecast.notes, *run.notes, *run.beyond(length)),
        )
        trace = steps[mode].trace()
        alive, curve = parts.at_the_peak(forecast, steps[mode], trace), parts.through_the_step(trace)
        forecast = dataclasses.replace(forecast, parts=alive, curve=curve)
        if spec.gpus > 1:
            quant = Quantization.parse(spec.quant)
            shared = shares.of_gpus(forecast, facts, quant, spec.gpus, peak=steps[mode].peak)
            forecast = dataclasses.replace(forecast, shares=shared)
        candidate = Candidate(forecast, facts, run)
        if spec.memory is not None:
            reserved = 0
            if forecast.device != "cpu" and trace.events:
                reserved = parts.allocated(forecast, facts, steps[mode], trace).peak_reserved
            answer = Answer(candidate, source, spec).facts
            cells = grid.cells(candidate, spec) if spec.cells else ()
            forecast = dataclasses.replace(forecast, reserved=reserved, answer=answer, cells=cells)
        forecast = dataclasses.replace(forecast, **_table(candidate, spec))
        if any(search.ended_early for search in candidate.searches.values()):
            forecast = dataclasses.replace(forecast, notes=(*forecast.notes, ENDED_EARLY))
        return forecast
    except NO_STEP as error:
        predict.raise_if_own(error)
        return dataclasses.replace(forecast, missing=cause(error))


def _table(candidate: Candidate, spec: CaseSpec) -> dict[str, Any]:
    """What fits by size of memory, by the names of ``ForecastFacts``: into the requested size, or into the common GPUs."""
    forecast, fits = candidate.forecast, spec.fits
    requested = [spec.memory] if spec.memory is not None else []
    sizes = sorted({*memory_sizes.GPUS, *requested}) if fits else requested
    length, mode = forecast.seq_len, forecast.mode
    rooms = {size: candidate.room(spec, size) for size in sizes}
    searches = {size: candidate.search(spec if size in requested else on_gpu_of(size, spec)) for size in sizes}
    lengths = dict.fromkeys((length, *(n for n in USUAL if fits and n <= forecast.limit)))
    largest = {n: {s: searches[s].largest_batch(n, room, mode).number for s, room in rooms.items()} for n in lengths}
    named = memory_sizes.named(spec.memory)
    return {
        "largest_batch": largest[length],
        "usual": {n: largest[n] for n in USUAL if n in largest and fits},
        "longest": {size: searches[size].longest(room, mode).number for size, room in rooms.items()},
        "rooms": {size: named[size] if size in requested else memory_sizes.alike(size) for size in sizes},
    }


def on_gpu_of(size: int, spec: CaseSpec) -> CaseSpec:
    """The spec on a GPU with this memory: kernels are the same from Ampere on, before it there is no flash attention."""
    gpu = memory_sizes.alike(size).split(", ")[0]
    return dataclasses.replace(spec, gpu=gpu if memory_sizes.CAPABILITIES[gpu] < AMPERE else "")
