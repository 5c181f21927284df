"""Which broken rule explains which others: what breaks it breaks them, too, as the kill matrix shows. Deeper causes come first."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from kbitcheck.core.result import Result, Status

EXPLAINS: Mapping[str, frozenset[str]] = {
    code: frozenset(f"KB{effect}" for effect in effects.split())
    for code, effects in {
        "KB212": "203 210 510",
        "KB207": "205 304 308 409 510 601 603",
        "KB205": "206 210 304 308 310 510 603",
        "KB206": "209 303 304 308 310 510",
        "KB203": "209 304 308 310",
        "KB201": "202 210 215 304 310",
        "KB202": "304 310",
        "KB215": "210 510 603",
        "KB209": "304 310",
        "KB102": "103 104",
        "KB301": "105 302 304 305 306 307 309 403",
        "KB312": "304 305 306 307 308",
        "KB302": "105 304 308 310",
        "KB303": "304 308 310",
        "KB304": "308 309 310",
        "KB401": "403 405 406",
        "KB403": "405 406",
        "KB313": "711",
        "KB714": "713 715",
        "KB713": "715",
        "KB712": "711 715",
        "KB725": "715",
        "KB718": "408 716 722",
        "KB716": "408",
    }.items()
}


def causes(results: Iterable[Result]) -> dict[str, str]:
    """For each broken rule that another one explains, the deepest such rule: broken in the same cases, by the same party."""
    broken: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for result in results:
        if result.status is Status.FAIL:
            broken[result.rule] |= {(result.case, failure.party) for failure in result.failures}
    explained: dict[str, str] = {}
    for cause, effects in EXPLAINS.items():
        for effect in effects & broken.keys():
            if cause in broken and broken[effect] <= broken[cause]:
                explained.setdefault(effect, cause)
    return explained
