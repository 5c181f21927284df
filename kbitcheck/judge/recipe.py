"""KB215: that the dtypes of a model follow one recipe, whichever it is."""

from collections.abc import Iterable

from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import Facts
from kbitcheck.core.recipe import groups
from kbitcheck.core.result import Level, Observation
from kbitcheck.core.rule import rule


@rule("KB215", "one-recipe", Level.MUST)
def one_recipe(facts: Facts) -> Iterable[Observation]:
    """Dtypes follow one recipe: the norms of a tower share a dtype, and so do its embeddings, the heads, and the adapters.

    The rule holds under every profile. Parameters that were loaded in float32 do not count; a mixture that the base was
    loaded with is noted, and is no failure.

    Why: no trainer prepares a model with a mixture of dtypes. A cast missed some parameters, or reached too many.
    Symptom: "expected scalar type Float but found BFloat16", in some layers only.
    Fix: cast by kind of parameter, not by a list of names; cast all adapters or none.
    Sources: unsloth-zoo#680, trl#7268, specification KB215.
    """
    try:
        loaded = facts.loaded
    except Unavailable:  # of a model that is prepared already
        loaded = None
    parts = groups(facts.prepared, facts.wrapped, loaded)
    if not any(group.prepared for group in parts):
        raise NotApplicable("the model has no norm, embedding, head or adapter that was loaded in half precision")
    for group in parts:
        dtypes = set(group.dtypes.values())
        note = f"{group.name}: loaded as a mixture of {' and '.join(sorted(dtypes))}" if len(dtypes) > 1 else ""
        for name, dtype in group.prepared.items():
            expected = f"{group.dtype}, as most of the {group.name}"
            yield Observation(name, expected, dtype, ok=dtype == group.dtype, note="" if group.mixed else note)
