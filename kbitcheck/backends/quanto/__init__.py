"""optimum-quanto: int8 weights by rows, int4 weights by groups, as tensors of classes of its own. Importing this imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.protocol import Arithmetic, Backend, Packing, Recognition
from kbitcheck.backends.schemes import Choice, Scheme
from kbitcheck.core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

PREFIX = "quanto-"
SCHEMES = (Scheme("quanto-int8", 8), Scheme("quanto-int4", 4))


class Quanto(Backend):
    """The backend; its parts are imported when first asked for."""

    name = "quanto"
    method = "quanto"
    libraries = ("optimum.quanto",)
    schemes = SCHEMES

    @cached_property
    def recognition(self) -> Recognition:
        from kbitcheck.backends.quanto.recognise import QuantoWeights

        return QuantoWeights()

    @cached_property
    def arithmetic(self) -> Arithmetic:
        from kbitcheck.backends.quanto.arithmetic import QuantoArithmetic

        return QuantoArithmetic()

    @cached_property
    def packing(self) -> Packing:
        from kbitcheck.backends.quanto.packing import QuantoPacking

        return QuantoPacking()

    def unavailable(self) -> str:
        installed = importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto")
        return "" if installed else "optimum-quanto is not installed: pip install 'kbitcheck[quanto]'"

    def described(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        scheme = PREFIX + str(config.get("weights"))
        if all(scheme != each.name for each in SCHEMES) or config.get("activations"):
            what = f"{config.get('weights')} with activations {config.get('activations')}"
            raise UsageError(
                f"this checkpoint is quantized by quanto as {what}; kbitcheck supports weights in int8 or int4 alone"
            )
        return scheme, {}, tuple(config.get("modules_to_not_convert") or ())

    def config(self, choice: Choice, skip: Sequence[str] | None) -> Any:
        import transformers

        make: Any = transformers.QuantoConfig
        return make(weights=choice.scheme.removeprefix(PREFIX), modules_to_not_convert=skip)

    def steady(self, model: nn.Module) -> None:
        from kbitcheck.backends.quanto import internals

        if any(self.recognition.holds(module) for module in model.modules()):
            internals.avoid_crash()


BACKEND = Quanto()
