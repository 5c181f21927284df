"""What a report shows of a watched run in figures. Plain data."""

from collections.abc import Mapping
from typing import Any

from kbitcheck.core.facts import ModelFacts, RunFacts, WatchedRun
from kbitcheck.core.recipe import groups


def watched_figures(run: WatchedRun, model: ModelFacts, step: RunFacts | None) -> dict[str, Any]:
    """Steps and their rates, optimizers, dtypes by kind of parameter, updates by adapter matrix, arguments of checkpointing.

    ``updates`` counts what an optimizer wanted to move and what the parameters' dtype rounded away; ``checkpointing`` are
    the arguments that reached torch's checkpoint, empty where none was called.
    """
    calls = [dict(call) for call in step.checkpoints] if step else []
    return {
        "steps": len(run.steps),
        "rates": [s.rate for s in run.steps],
        "optimizers": list(run.optimizers),
        "dtypes": {group.name: sorted(set(group.dtypes.values())) for group in groups(model, model)},
        "updates": _updates(run),
        "entering": dict(run.entering),
        "attention": run.attention,
        "checkpoints": len(calls),
        "checkpointing": calls[0] if calls else {},
        "switched_on": [{"passed": sorted(call.passed), "used": dict(call.used)} for call in run.switched_on],
    }


def _updates(run: WatchedRun) -> Mapping[str, Mapping[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for step in run.steps:
        for name, update in step.updates.items():
            matrix = next((part for part in name.split(".") if part.startswith("lora_")), "others")
            count = counts.setdefault(matrix, {"wanted": 0, "lost": 0})
            count["wanted"] += update.wanted
            count["lost"] += update.lost
    return counts
