"""KB803: how adapters start."""

import math
from collections.abc import Iterable

from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Level, Observation, Party
from kbitcheck.core.rule import rule
from kbitcheck.judge.attribution import unless_unprepared


@rule("KB803", "start-keeps-function", Level.MUST)
def start_keeps_function(facts: Facts) -> Iterable[Observation]:
    """Adapters that were put on as their configuration says, and have not trained, leave the logits as they were, within what rounding does.

    For adapters of a configuration (``--adapters peft:OLoRA``, or its file). All other rules are judged of such adapters, too,
    with drawn numbers: that they alone train, get the float64 twin's gradients with checkpointing and without, and are saved.

    Why: an initialisation of the base's weights takes its part out of them. Of packed weights the rest has to be quantized
    anew, which moves every weight by up to a step.
    Symptom: a loss at step 0 above the base's; a saved adapter that fits no other copy of the base.
    Fix: initialise on the unquantized model, save the rest, and quantize that; or take a start that is zero.
    Sources: peft documentation of ``init_lora_weights``; peft#2049, peft#3088; docs/findings/peft_olora_requantizes.py; specification KB803.
    """
    start, function = facts.start, facts.function
    if start.left_out == start.tokens:
        raise NotApplicable("rounding moved the experts of every token")
    # The model's logits are this far from the float64 twin's, as the base's are; so are those that an identity more rounds.
    bound = 4 * (max(function.twin_error, function.ulp) + function.base_error)
    if not math.isfinite(bound):
        raise NotApplicable("the logits of the float twin or of the unprepared base are not finite")
    left = f"; {start.left_out} of {start.tokens} tokens left out, their experts changed" if start.left_out else ""
    seen = Observation(
        "logits",
        f"within {bound:.2e} of those without adapters",
        f"off by {start.apart:.2e}{left}",
        ok=start.apart <= bound,
    )
    yield unless_unprepared(seen, facts, Party.STACK, lambda base: base.start.apart > bound)
