"""Hub ids, ``org/name``, through the ordinary hub cache; what is cached is used without a network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kbitcheck.core.errors import UsageError
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.models import checkpoint
from kbitcheck.models.sources import config, local
from kbitcheck.models.sources.source import Source, config_dtype

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hub(Source):
    """A model on the hub. Its weights are fetched when ``checkpoint`` is first read, not before."""

    @property
    def checkpoint(self) -> Path:
        """The directory in the hub cache, with the weights."""
        return self._fetched.folder

    @property
    def drawn(self) -> bool:
        """Never."""
        return False

    @property
    def unquantized_dtype(self) -> str:
        """What the user requests, else what the configuration states, else what the tensors have (fetches them)."""
        return self.dtype or config_dtype(self.config) or self._fetched.unquantized_dtype

    @property
    def _fetched(self) -> local.Local:
        return _fetched(self.name, self.revision, self.trust_remote_code, self.allow_pickle)


def read(name: str, *, random_weights: bool, static: bool = False, predicted: bool = False, **options: Any) -> Source:
    """The source for a hub id, once its configuration is here; ``random_weights`` and ``static`` fetch nothing else.

    ``predicted`` says that sizes will do where the weights were quantized by something other than bitsandbytes.
    """
    folder = _fetch(name, ("*.json",), options["revision"])
    fields = _config(folder, name)
    if random_weights or static or (predicted and config.unloadable(fields)):
        source = config.read(fields, name=name, random_weights=random_weights, static=True, **options)
        return replace(source, folder=folder)
    return Hub(name=name, config=fields, **options)


def cached() -> list[str]:
    """The ids of the models that the hub cache holds, sorted."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    return sorted("/".join(path.name.split("--", 2)[1:]) for path in folders)


def _config(folder: Path, name: str) -> Mapping[str, Any]:
    if not (folder / checkpoint.CONFIG).exists():
        raise UsageError(f"{name} has no {checkpoint.CONFIG} on the hub, so it is no transformers model")
    return checkpoint.read_config(folder / checkpoint.CONFIG, name)


@cache
def _fetched(name: str, revision: str | None, code: bool, allow_pickle: bool) -> local.Local:
    wanted = ("*.json", "*.safetensors", *(("*.py",) if code else ()))
    folder = _fetch(name, wanted, revision)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _fetch(name, (*wanted, "pytorch_model*.bin"), revision)
    files = checkpoint.weight_files(folder, name, allow_pickle=allow_pickle)
    if not files:
        raise UsageError(
            f"{name} has no safetensors weights; give --allow-pickle if it has others, or --random-weights"
        )
    return local.read(folder, files, _config(folder, name), name=name)


def _fetch(name: str, wanted: tuple[str, ...], revision: str | None) -> Path:
    """The snapshot's directory with the files that match ``wanted`` (top level only), fetched if they are not there."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    at = f" at revision {revision}" if revision else ""
    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted), ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise UsageError(f"{name} is gated: accept its terms on the hub and log in (`hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{name} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(f"the hub has no model {name}{_hint(name)}; a directory is written ./{name}") from None
    except Exception as error:
        reason = type(error).__name__
        message = f"{name}{at} is neither a directory nor in the hub cache, and the hub cannot be reached ({reason})"
        raise UsageError(message + _hint(name)) from error
    finally:
        if bars:
            enable_progress_bars()


def _hint(name: str) -> str:
    return did_you_mean(name, cached(), cutoff=0.8)
