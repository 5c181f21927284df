"""The batch that is drawn for a case, beside its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable, cause
from kbitcheck.core.facts import BlockwiseFacts, Distance, DrawnFacts, median_yardstick
from kbitcheck.models.inputs.drawn import Conditions
from kbitcheck.models.inputs.text import Batch, usual_length
from kbitcheck.observe.forecast.predict import token_limit
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import forwards, step
from kbitcheck.observe.twin.twins import live


def drawn_batch(loaded: Loaded, spec: CaseSpec, *, shared: bool = False) -> tuple[Conditions, Batch]:
    """What a case's batch is like, and the batch; a ``shared`` one is small, and the same for each case of a base.

    Where the model's own code runs on no batch of the drawn length, a shorter one is drawn.

    Raises:
        Unavailable: the caller named the batch, or no batch of any length can be made.
    """
    if loaded.training.batch is not None or spec.batch is not None or spec.seq_len is not None:
        raise Unavailable("the batch is the one that was asked for")
    limit, failed = token_limit(loaded.pristine), None
    while True:
        if shared:
            conditions = Conditions.drawn(f"{spec.seed}", limit=limit, large=True)
        else:  # a cut is one of a large model
            conditions = Conditions.of_case(spec, limit=limit, large=loaded.large or spec.cut == "never")
        try:
            return conditions, conditions.batch(partial(loaded.source.batch, loaded.pristine, seed=spec.seed))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the model's own code: it may raise anything
            failed = failed or error
        limit = conditions.length // 2
        if limit < usual_length(loaded.pristine):
            raise Unavailable(f"the model's own code runs on no batch that is drawn: {cause(failed)}")


@contextmanager
def unless_base_raises(loaded: Loaded, batch: Batch) -> Iterator[None]:
    """``Unavailable`` instead of what is raised within, where the unprepared base raises on the batch, too."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if forwards.evaluate(loaded.copy(), batch, nullcontext).raised:
            raise Unavailable(f"the unprepared base does not run on the drawn batch either: {cause(error)}") from error
        raise


def drawn_facts(
    conditions: str, blockwise: BlockwiseFacts, plain: step.Step, checkpointed: step.Step | None, usual: step.Step
) -> DrawnFacts:
    """The facts of a plain step of the batch, and of one with checkpointing if there is one, beside the case's ``usual`` one."""
    if checkpointed is None:
        return DrawnFacts(conditions=conditions, blockwise=blockwise)
    return DrawnFacts(
        conditions=conditions,
        blockwise=blockwise,
        against_plain=against_plain(checkpointed.gradients, plain.gradients, usual.gradients, blockwise),
        checkpoints=len(checkpointed.facts.checkpoints),
        usual_checkpoints=len(usual.facts.checkpoints),
    )


def against_plain(
    checkpointed: step.Gradients, plain: step.Gradients, usual: step.Gradients, blockwise: BlockwiseFacts
) -> Mapping[str, Distance]:
    """How far each adapter's gradient with checkpointing is from that without it.

    Layers whose adapters have no gradient with checkpointing on the case's ``usual`` batch either are left out: their fault hangs on
    no batch. Of a fresh adapter ``lora_A`` alone has none there.
    """
    least = median_yardstick(blockwise.adapters.values())
    yardsticks = {name: max(gap.yardstick, least) for name, gap in blockwise.adapters.items()}
    reached = {_layer(name) for name, gradient in usual.items() if live(gradient)}
    judged = {name: gradient for name, gradient in checkpointed.items() if _layer(name) in reached}
    return step.distances(judged, plain, yardsticks)


def _layer(adapter: str) -> str:
    return adapter.partition(".lora_")[0]
