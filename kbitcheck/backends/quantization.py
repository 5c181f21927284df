"""What ``--quant`` says: how a model's linear layers are quantized. Importing this imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from kbitcheck.backends import registry
from kbitcheck.backends.protocol import Backend
from kbitcheck.backends.schemes import Scheme
from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean

DEFAULT = "nf4"


@dataclass(frozen=True, slots=True)
class Quantization:
    """One scheme of one backend. ``options`` holds those that are not at their default, in the scheme's order.

    ``skip`` names modules that stay as they are, beside the head and tied modules.
    """

    scheme: str = DEFAULT
    options: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()

    @property
    def backend(self) -> Backend:
        """The backend that quantizes so."""
        return registry.of_scheme(self.scheme)

    def __getitem__(self, name: str) -> str:
        """The value of an option: its default where it is left out, "" for a flag that is not set, its name for one that is."""
        option = self.backend.scheme(self.scheme).option(name)
        return dict(self.options).get(name, option.default if option else "")

    @classmethod
    def of(cls, scheme: Scheme, values: Mapping[str, object], skip: Iterable[str] = ()) -> Self:
        """The quantization with these options: of a flag its truth, of another option any spelling of a choice."""
        chosen: dict[str, str] = {}
        for name, value in values.items():
            option = scheme.option(name)
            if option is None:
                options = ", ".join([*map(str, scheme.options), "skip=MODULE"])
                raise UsageError(f"quantization {scheme.name} takes only {options}, not {name}")
            if option.choices:
                read = option.read(value)
                if read is None:
                    what = f"{name} dtype" if option.aliases else name
                    raise UsageError(f"unknown {what} {value!r}; known: {', '.join(sorted(option.choices))}")
                chosen[name] = read
            elif value:
                chosen[name] = name
        others = tuple((o.name, chosen[o.name]) for o in scheme.options if chosen.get(o.name, o.default) != o.default)
        return cls(scheme=scheme.name, options=others, skip=tuple(dict.fromkeys(skip)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``nf4,double,compute=bf16,storage=uint8,skip=lm_head``.

        Dtypes may have their long names; ``skip`` may be repeated and takes several names separated by ``+``. A
        ``UsageError`` lists the right schemes, options and choices.
        """
        name, *parts = (part.strip() for part in text.split(","))
        schemes = registry.schemes()
        if name not in schemes:
            hint = did_you_mean(name, [scheme.name for scheme in registry.on_load()])
            raise UsageError(f"unknown quantization {name!r} in {text!r}{hint}; known: {usage()}")
        options = [option for scheme in schemes.values() for option in scheme.options]
        values: dict[str, object] = {}
        skip: list[str] = []
        for part in parts:
            key, equals, value = part.partition("=")
            if key == "skip" and value.strip("+ "):
                skip += [module.strip() for module in value.split("+") if module.strip()]
            elif key in values:
                raise UsageError(f"{key} stands twice in {text!r}")
            elif not any(o.name == key and bool(o.choices) == bool(equals) for o in options):
                raise UsageError(f"unknown quantization option {part!r} in {text!r}; known: {usage()}")
            else:
                values[key] = value or True
        try:
            return cls.of(schemes[name], values, skip)
        except UsageError as error:
            raise UsageError(f"{error} in {text!r}") from None

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        """The quantization that a checkpoint's ``quantization_config`` (the JSON object) describes."""
        backend = registry.of_method(config)
        if backend is None:
            names = ", ".join(b.name for b in registry.registered())
            raise UsageError(
                f"this checkpoint is quantized with {config.get('quant_method')}; kbitcheck supports {names}"
            )
        if reason := backend.unavailable():
            raise UsageError(f"this checkpoint is quantized with {config.get('quant_method')}; {reason}")
        scheme, values, skip = backend.described(config)
        return cls.of(backend.scheme(scheme), values, skip)

    def __str__(self) -> str:
        """The canonical text: defaults are left out, and ``parse`` reads it back."""
        options = (name if name == value else f"{name}={value}" for name, value in self.options)
        return ",".join([self.scheme, *options, *([f"skip={'+'.join(self.skip)}"] if self.skip else [])])

    def config(self, extra_skip: Iterable[str] = ()) -> Any:
        """The same as a transformers configuration.

        ``extra_skip`` stands before ``skip``. transformers leaves the head and tied modules out of quantization only
        where no skip list is passed at all: a caller who passes one adds those names here (``models.load`` does).
        """
        return self.backend.config(self, list(dict.fromkeys((*extra_skip, *self.skip))) or None)


def usage() -> str:
    """What ``--quant`` takes, in one line: each scheme with its options."""
    names: dict[str, list[str]] = {}
    for scheme in registry.on_load():
        options = ", ".join(map(str, scheme.options))
        names.setdefault(f"any of {options}, " if options else "", []).append(scheme.name)
    return "; ".join(
        f"{' or '.join(schemes)}, then {options}skip=MODULE[+MODULE]" for options, schemes in names.items()
    )
