"""Where models come from: recipes, local directories, the hub, and configurations without weights. No torch here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec, Static
from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.models import checkpoint
from kbitcheck.models.sources import architecture, config, gguf, hub, local, recipe
from kbitcheck.models.sources.source import Source, requested_dtype

__all__ = ["Source", "resolve", "source_of"]

FORMS = "a recipe (tiny:llama, FILE.toml), arch:TYPE, a directory, a config.json, a .gguf file, or a hub id (org/name)"


def source_of(spec: CaseSpec, *, static: Static = "never") -> Source:
    """The source that a case names, under all its options; ``static`` as of ``resolve``."""
    return resolve(
        spec.model,
        static=static,
        random_weights=spec.random_weights,
        dtype=spec.dtype,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        allow_pickle=spec.allow_pickle,
    )


def resolve(
    model: str,
    *,
    static: Static = "never",
    random_weights: bool = False,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Source:
    """The source that a MODEL argument names, checked as far as possible without torch.

    With ``static`` always, only the configuration is read; with ``if-too-large``, a configuration without weights is
    enough. A path that exists precedes a hub id. Only a hub id uses the network, and only for its JSON files.
    """
    wanted = requested_dtype(dtype)
    if model.startswith(recipe.PREFIX):
        return recipe.named(model.removeprefix(recipe.PREFIX), dtype=wanted)
    if model.startswith(architecture.PREFIX):
        return architecture.named(model, dtype=wanted)
    options: dict[str, Any] = {
        "dtype": wanted,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
    }
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".toml":
        return recipe.read(path, name=model, dtype=wanted)
    if model and path.exists():
        source = _at(path, name=model, random_weights=random_weights, static=static, **options)
    elif hub.ID.fullmatch(model) and path.suffix not in (".toml", ".json"):
        source = hub.read(
            model, random_weights=random_weights, static=static == "always", predicted=static != "never", **options
        )
    else:
        raise UsageError(f"no such model {model!r}{_hint(model)}; a model is {FORMS}")
    if source.remote_code and not trust_remote_code and source.loadable:
        raise UsageError(f"{model} needs code from its repository: --trust-remote-code lets it run")
    own = source.quant  # refuses what no backend quantized
    backend = Quantization.parse(own).backend if own else None
    if backend is not None and backend.static_only and source.loadable:
        why = f"this checkpoint is quantized with {backend.method}, and {backend.static_only}"
        raise UsageError(f"{why}: give --static, or a checkpoint that is not")
    return source


def _at(path: Path, *, name: str, random_weights: bool, static: Static, **options: Any) -> Source:
    made: dict[str, Any] = {"name": name, "random_weights": random_weights, "static": static != "never", **options}
    quantized = gguf.file_of(path, name) if path.is_file() or not (path / checkpoint.CONFIG).exists() else None
    if quantized is not None:
        return gguf.read(quantized, **{**made, "static": static == "always"})
    if path.is_file() and path.suffix == ".json":
        return config.read(checkpoint.read_config(path, name), **made)
    if path.is_file():
        raise UsageError(f"{name} is a file, but no recipe (.toml) and no config.json; a model is {FORMS}")
    if not (path / checkpoint.CONFIG).exists():
        raise UsageError(f"{name} {_what_it_is(path)}")
    fields = checkpoint.read_config(path / checkpoint.CONFIG, name)
    if random_weights or static == "always" or (static != "never" and config.unloadable(fields)):
        return replace(config.read(fields, **made), folder=path)
    files = checkpoint.weight_files(path, name, allow_pickle=options["allow_pickle"])
    return local.read(path, files, fields, name=name, **options) if files else config.read(fields, **made)


def _what_it_is(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "holds an adapter: give the base model that it was trained on"
    if not any(folder.iterdir()):
        return "is an empty directory"
    return f"is no model: it has no {checkpoint.CONFIG}"


def _hint(model: str) -> str:
    recipes = [recipe.PREFIX + name for name in recipe.names()]
    candidates = (model, recipe.PREFIX + model) if model else ()
    return next(filter(None, (did_you_mean(each.lower(), recipes, cutoff=0.75) for each in candidates)), "")
