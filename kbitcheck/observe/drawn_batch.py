"""The batch that is drawn for a case, beside its own."""

from functools import partial

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import Unavailable
from kbitcheck.models.inputs.drawn import Conditions
from kbitcheck.models.inputs.text import Batch
from kbitcheck.observe.forecast.predict import token_limit
from kbitcheck.observe.loaded import Loaded


def drawn_batch(loaded: Loaded, spec: CaseSpec, *, shared: bool = False) -> tuple[Conditions, Batch]:
    """What a case's batch is like, and the batch; a ``shared`` one is small, and the same for each case of a base.

    Raises:
        Unavailable: the caller named the batch.
    """
    if loaded.training.batch is not None or spec.batch is not None or spec.seq_len is not None:
        raise Unavailable("the batch is the one that was asked for")
    limit = token_limit(loaded.pristine)
    if shared:
        conditions = Conditions.drawn(f"{spec.seed}", limit=limit, large=True)
    else:  # a cut is one of a large model
        conditions = Conditions.of_case(spec, limit=limit, large=loaded.large or spec.cut == "never")
    return conditions, conditions.batch(partial(loaded.source.batch, loaded.pristine, seed=spec.seed))
