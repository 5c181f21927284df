"""The form that is drawn for a case, in which its drawn batch is passed to the model."""

import random

import torch

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.conditions import TURNS, share
from kbitcheck.models.inputs.text import Batch
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import step, switches
from kbitcheck.observe.probes.forms import FORMS, PLAIN, Formed


def in_drawn_form(loaded: Loaded, spec: CaseSpec, batch: Batch) -> Batch:
    """The batch in a form that depends on the case's seed, and that the unprepared base takes.

    Without one where a caller says how the model is called, and of a large model, of which each further copy is dear.
    """
    if not loaded.copies or loaded.reads_labels or loaded.large or loaded.of_large:
        return batch
    place = share(spec.conditions)
    forms = [form for form in FORMS if form.exact and form.taken_by(loaded.pristine, batch)]
    random.Random(f"form of {spec.entropy if place is None else spec.seed}").shuffle(forms)  # noqa: S311
    first = 0 if place is None else place[0] // TURNS % len(forms)  # cases of one suite begin at one each
    for form in forms[first:] + forms[:first]:
        formed = Formed(batch, form)
        if form is PLAIN:
            return batch
        if _runs(loaded, formed):
            return formed
    return batch


def _runs(loaded: Loaded, batch: Formed) -> bool:
    model = loaded.copy().train()
    try:
        with torch.no_grad(), switches.seeded(0, batch):
            step.forward(model, batch)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # the model's own code may raise anything
        return False
    return True


def called(batch: Batch) -> str:
    """How a batch is passed to the model, in words; empty where it is by its own keywords."""
    return f", called with {batch.form.name}" if isinstance(batch, Formed) else ""
