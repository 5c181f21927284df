"""What could not be judged, beside the reference: where that can be judged on the same case, the implementation is at fault."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from kbitcheck.core.cases import REFERENCE, CaseSpec
from kbitcheck.core.events import Event, Judged
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import Rule

WHERE = "where the reference can be judged"
TIMES = 10  # as slow as the reference on one case is no healthy implementation

Ask = Callable[[CaseSpec, Sequence[Rule], float], Iterable[Event]]  # with a share of the time limit


def settled(spec: CaseSpec, rules: Sequence[Rule], errors: Sequence[Judged], ask: Ask) -> Iterator[Judged]:
    """The errors of one case, in the order of ``rules``. Of one cause the first MUST fails, and the others are skipped.

    An error stays one where the reference has one too, and where that cannot be told: no memory is the machine's fault, and
    no time may be, unless the reference takes a tenth of the time limit at most.
    """
    causes: dict[str, list[Judged]] = {}
    for error in errors:
        causes.setdefault(error.result.reason, []).append(error)
    for of_one in causes.values():
        codes = {error.result.rule for error in of_one}
        judged = [rule for rule in rules if rule.code in codes]
        named = next((rule for rule in judged if rule.level is Level.MUST), judged[0])
        short_of = of_one[0].short_of
        if short_of == "memory":
            yield from of_one
            continue
        # What ended the process was the first rule's; what took too long may be any's.
        witness = rules if short_of == "time" else list(dict.fromkeys((judged[0], named)))
        share = 1 / TIMES if short_of == "time" else 1.0
        of_reference = ask(replace(spec, implementation=REFERENCE), witness, share)
        results = [event.result for event in of_reference if isinstance(event, Judged)]
        if len(results) < len(witness) or any(result.status is Status.ERROR for result in results):
            yield from of_one
        else:
            yield from (replace(error, result=_settled(error.result, named.code)) for error in of_one)


def _settled(result: Result, named: str) -> Result:
    cause = result.reason
    if result.rule != named:
        return replace(result, status=Status.SKIP, reason=f"not judged, as {named} in this case: {cause}")
    seen = Observation(WHERE, "judged", f"not judged: {cause}", ok=False)
    return replace(
        result,
        status=Status.FAIL,
        reason="",
        attributed_to=Party.IMPLEMENTATION,
        examined=max(result.examined, 1),
        failures=(seen,),
    )
