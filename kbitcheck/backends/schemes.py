"""How the schemes of a backend are written in ``--quant``. Importing this imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "uint8": "uint8"}
SHORT_DTYPES: Mapping[str, str] = {
    **{name: name for name in DTYPES},
    **{long: short for short, long in DTYPES.items()},
    "half": "fp16",
    "float": "fp32",
}


def short_dtype(value: object) -> str | None:
    """``bf16`` for "bfloat16", "torch.bfloat16" or a torch dtype; None where the text names no dtype in ``DTYPES``."""
    return SHORT_DTYPES.get(str(value).strip().removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a scheme. One without ``choices`` is a flag; ``default`` is left out of the text form.

    Random cases leave out an option that is not for ``every_model``.
    """

    name: str
    choices: tuple[str, ...] = ()
    default: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    every_model: bool = True

    def __str__(self) -> str:
        return f"{self.name}={'|'.join(self.choices)}" if self.choices else self.name

    def read(self, value: object) -> str | None:
        """The choice that ``value`` means; None where it means none."""
        text = str(value).strip().removeprefix("torch.")
        text = self.aliases.get(text, text)
        return text if text in self.choices else None


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way a backend quantizes. ``bits`` is what a weight takes, without its state.

    ``stored_alone`` is why only checkpoints are quantized so, and no model on load; empty where its backend does that.
    """

    name: str
    bits: int
    options: tuple[Option, ...] = ()
    stored_alone: str = ""

    def option(self, name: str) -> Option | None:
        """The option of that name, if the scheme has one."""
        return next((option for option in self.options if option.name == name), None)


def dtype_option(name: str, *choices: str) -> Option:
    """An option whose value is a dtype; the first choice is the default, and long names are read too."""
    return Option(name, choices, choices[0], SHORT_DTYPES)


class Choice(Protocol):
    """A scheme with its options chosen, as a backend reads it; ``kbitcheck.backends.quantization.Quantization`` is one."""

    @property
    def scheme(self) -> str: ...

    def __getitem__(self, name: str) -> str:
        """The value of an option; "" for a flag that is not set."""
        ...
