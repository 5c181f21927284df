"""``arch:TASK/TYPE``: any architecture of transformers, shrunk, with random weights. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.models.sources.source import Source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kbitcheck.backends.quantization import Quantization
    from kbitcheck.models.random_weights import Plan

PREFIX = "arch:"
CAUSAL_LM = "causal-lm"
# Each task with transformers' table of the architectures that have a head for it.
TASKS: Mapping[str, str] = {
    CAUSAL_LM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Architecture(Source):
    """A model type's class for one task, as small as it can be, with random weights."""

    task: str
    model_type: str

    attention: ClassVar[str | None] = "eager"

    @property
    def plan(self) -> Plan:
        """What the weights are drawn by."""
        return replace(super(Architecture, self).plan, config=self.fields())

    def fields(self) -> dict[str, Any]:
        """The tiny ``config.json``."""
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from kbitcheck.models import load as loading
        from kbitcheck.models.zoo import shrink as shrinking

        classes = listed(self.task)
        if self.model_type not in classes:
            hint = did_you_mean(self.model_type, classes)
            raise UsageError(f"transformers has no {self.task} model of type {self.model_type!r}{hint}")
        name = classes[self.model_type]
        with loading.quiet(), loading.errors_as_usage(self.name):
            configured = CONFIG_MAPPING[self.model_type]
            # The class for text alone, of a type that also reads images or audio, takes the text model's configuration.
            own = getattr(getattr(transformers, name), "config_class", None)
            if own is not None and own in (getattr(configured, "sub_configs", None) or {}).values():
                configured = own
            fields = shrinking.tiny(configured, decoder=self.task == CAUSAL_LM)
        return {**fields, "architectures": [name], "dtype": self.unquantized_dtype}

    def meta(self, quant: Quantization | None) -> PreTrainedModel:
        """The shrunk model on the meta device."""
        from kbitcheck.models import meta

        return meta.build(self.fields(), quant, self._options("cpu"))

    def _complete(self, quant: Quantization) -> Quantization:
        from kbitcheck.models.zoo import shrink as shrinking

        skip = shrinking.families().get(self.model_type, {}).get(shrinking.SKIP, ())
        return replace(quant, skip=tuple(dict.fromkeys((*skip, *quant.skip))))

    def batch(
        self, model: PreTrainedModel, *, batch: int | None = None, seq_len: int | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """A training batch: images or audio where the task needs them and kbitcheck supports their layout, else text alone.

        A model that runs on no layout, quantized or in half precision, gets the one that its float32 checkpoint runs on.
        """
        from kbitcheck.models.inputs.choose import first_fitting
        from kbitcheck.models.inputs.text import ROWS, draw, fit, usual_length
        from kbitcheck.models.load import load

        shape: dict[str, Any] = {"batch": batch or ROWS, "seq_len": seq_len or usual_length(model), "seed": seed}
        if self.task == CAUSAL_LM:
            return draw(model, **shape, images=False)
        shape["images"] = self.task == "image-text-to-text"
        shape["audio"] = self.task in ("speech-seq2seq", "seq2seq-lm")
        try:
            return first_fitting(model, **shape)
        except Exception:  # the model's own code: it may raise anything, and does so again when it is judged
            plain = load(self.checkpoint, None, replace(self._options("cpu"), dtype="float32"))
            return fit(first_fitting(plain, **shape), model)


def named(name: str, *, dtype: str | None = None) -> Architecture:
    """The source behind ``arch:TASK/TYPE`` or ``arch:TYPE``, whose task is causal language modelling.

    Whether there is such a type shows when it is loaded.
    """
    task, _, model_type = name.removeprefix(PREFIX).rpartition("/")
    task = task or CAUSAL_LM
    if task not in TASKS or not model_type:
        raise UsageError(
            f"{name!r} names no architecture; write arch:TYPE or arch:TASK/TYPE, TASK one of {', '.join(TASKS)}"
        )
    config = {"model_type": model_type, "dtype": "bfloat16"}
    return Architecture(name=name, config=config, dtype=dtype, task=task, model_type=model_type)


def listed(task: str) -> dict[str, str]:
    """Class by model type: every architecture of the installed transformers that has a head for the task."""
    from transformers.models.auto import modeling_auto

    classes: Mapping[str, Any] = getattr(modeling_auto, TASKS[task])
    return {kind: each if isinstance(each, str) else each[0] for kind, each in classes.items()}
