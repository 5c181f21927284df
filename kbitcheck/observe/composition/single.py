"""One process: a compiled step, and copies."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kbitcheck.core.errors import Raised
from kbitcheck.observe.composition.steps import Record, Run, by_name
from kbitcheck.observe.probes.adapters import Attached


class Compiled(Run):
    """Steps of a model that ``torch.compile`` has captured, forward and backward; eager kernels run them, which takes no compiler."""

    counts_runs = False  # hooks would be captured, too

    def wrap(self, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> nn.Module:
        torch.compiler.set_stance("default")
        compiled: Any = torch.compile(model, backend="aot_eager")
        return compiled  # type: ignore[no-any-return]


class Copies(Run):
    """Steps of a deep copy and of a pickle of the prepared model with adapters."""

    processes = ("one process",)

    def copied(self) -> Mapping[str, Callable[[Any], Any]]:
        """The ways of copying a model, by the name of the copy."""
        return {"the deep copy": copy.deepcopy, "the pickle": unpickled}

    def go(self) -> None:
        parts: list[Record] = []
        for name, way in self.copied().items():
            model, adapters = self.attached()
            record: Record = {"name": name}
            parts.append(record)
            try:
                self.train(Attached(way(model), dict(adapters)), record)
            except Exception as error:
                record["raised"] = Raised.of(error)
        self.record["parts"] = parts

    def train(self, attached: Attached, record: Record) -> None:
        """The steps of a copy, whose adapters have the names of the original's."""
        own, self.record = self.record, record
        try:
            names = by_name(attached.model, attached.adapters)()
            self.trained(Attached(attached.model, dict(names)))
        finally:
            self.record = own


def unpickled(model: Any) -> Any:
    """What a pickle of a model is loaded as."""
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    return pickle.loads(buffer.getvalue())  # noqa: S301
