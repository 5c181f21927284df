"""What ``--quant`` says: how a model's linear layers are quantized. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from kbitcheck.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Kind = Literal["nf4", "fp4", "int8"]
Compute = Literal["bf16", "fp16", "fp32"]
Storage = Literal["uint8", "bf16", "fp16", "fp32"]

KINDS = ("nf4", "fp4", "int8")
LONG = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "uint8": "uint8"}
SHORT = {
    **{name: name for name in LONG},
    **{long: short for short, long in LONG.items()},
    "half": "fp16",
    "float": "fp32",
}
KNOWN = (
    "nf4 or fp4, then any of double, compute=bf16|fp16|fp32, storage=uint8|bf16|fp16|fp32, skip=MODULE[+MODULE]; "
    "or int8, then skip=MODULE[+MODULE]"
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """One bitsandbytes quantization. ``skip`` names modules that stay as they are, beside the head and tied modules.

    ``double`` (nested quantization of the scales), ``compute`` (dtype of the matrix products) and ``storage`` (dtype
    that the packed weights are stored as) mean nothing for int8 and keep their defaults there.
    """

    kind: Kind = "nf4"
    double: bool = False
    compute: Compute = "bf16"
    storage: Storage = "uint8"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "int8" and (self.double, self.compute, self.storage) != (False, "bf16", "uint8"):
            raise UsageError(f"quantization int8 takes only skip=MODULE; known: {KNOWN}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``nf4,double,compute=bf16,storage=uint8,skip=lm_head``.

        Dtypes may be given by their long names; ``skip`` may be repeated and takes several names separated by ``+``.

        Raises:
            UsageError: anything unknown, in one line that lists what is known.
        """
        kind, *options = (part.strip() for part in text.split(","))
        if kind not in KINDS:
            raise UsageError(f"unknown quantization {kind!r} in {text!r}; known: {KNOWN}")
        fields: dict[str, Any] = {}
        skip: list[str] = []
        for option in options:
            key, given, value = option.partition("=")
            if key == "skip" and value.strip("+ "):
                skip += [name.strip() for name in value.split("+") if name.strip()]
            elif key in fields:
                raise UsageError(f"{key} is given twice in {text!r}")
            elif option == "double":
                fields["double"] = True
            elif key in ("compute", "storage") and given:
                fields[key] = _dtype(value, storage=key == "storage", text=text)
            else:
                raise UsageError(f"unknown quantization option {option!r} in {text!r}; known: {KNOWN}")
        if kind == "int8" and fields:
            raise UsageError(f"quantization int8 takes only skip=MODULE, not {', '.join(fields)}; known: {KNOWN}")
        return cls(kind=cast(Kind, kind), skip=tuple(dict.fromkeys(skip)), **fields)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        """The quantization that a checkpoint's ``quantization_config`` (the JSON object) describes.

        Raises:
            UsageError: it was quantized by something other than bitsandbytes.
        """
        method = config.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise UsageError(f"this checkpoint is quantized with {method}; kbitcheck supports bitsandbytes")
        skip = tuple(config.get("llm_int8_skip_modules") or ())
        if not config.get("load_in_4bit"):
            return cls(kind="int8", skip=skip)
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if kind not in KINDS[:2]:
            raise UsageError(f"this checkpoint is quantized as {kind!r}; kbitcheck knows {', '.join(KINDS)}")
        return cls(
            kind=kind,
            double=bool(config.get("bnb_4bit_use_double_quant", False)),
            compute=_dtype(config.get("bnb_4bit_compute_dtype", "float32"), text="bnb_4bit_compute_dtype"),
            storage=_dtype(config.get("bnb_4bit_quant_storage", "uint8"), storage=True, text="bnb_4bit_quant_storage"),
            skip=skip,
        )

    def __str__(self) -> str:
        """The canonical text: defaults are left out, and ``parse`` reads it back."""
        parts: list[str] = [self.kind]
        if self.double:
            parts.append("double")
        if self.compute != "bf16":
            parts.append(f"compute={self.compute}")
        if self.storage != "uint8":
            parts.append(f"storage={self.storage}")
        if self.skip:
            parts.append(f"skip={'+'.join(self.skip)}")
        return ",".join(parts)

    def config(self, extra_skip: Iterable[str] = ()) -> BitsAndBytesConfig:
        """The same as a transformers configuration.

        ``extra_skip`` is put before ``skip``. transformers leaves the head and tied modules out of quantization only
        where no skip list is given at all: who passes one adds those names here (``models.loading`` does).
        """
        import torch
        import transformers

        make: Any = transformers.BitsAndBytesConfig
        skip = list(dict.fromkeys((*extra_skip, *self.skip))) or None
        if self.kind == "int8":
            return cast("BitsAndBytesConfig", make(load_in_8bit=True, llm_int8_skip_modules=skip))
        configured = make(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=getattr(torch, LONG[self.compute]),
            bnb_4bit_quant_storage=getattr(torch, LONG[self.storage]),
            llm_int8_skip_modules=skip,
        )
        return cast("BitsAndBytesConfig", configured)


def _dtype(value: object, *, text: str, storage: bool = False) -> Any:
    known = [name for name in LONG if storage or name != "uint8"]
    short = SHORT.get(str(value).strip().removeprefix("torch."))
    if short not in known:
        what = "storage" if storage else "compute"
        raise UsageError(f"unknown {what} dtype {value!r} in {text!r}; known: {', '.join(known)}")
    return short
