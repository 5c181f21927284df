"""A stub of ``kbitcheck.observe.watch.own_steps``: what is passed is the model."""

from typing import Any


def trained_by(model: Any, training: Any) -> tuple[Any, Any]:
    return model, training
