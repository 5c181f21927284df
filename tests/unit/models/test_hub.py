from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.errors import UsageError
from kbitcheck.models.sources import hub
from kbitcheck.models.sources.resolve import resolve

NF4 = Quantization()
SHA = "0123456789abcdef0123456789abcdef01234567"
Cache = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """An offline hub cache, and a function that puts a directory into it under an id."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, folder: Path) -> Path:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(SHA)
        shutil.copytree(folder, home / "snapshots" / SHA)
        return home / "snapshots" / SHA

    hub._fetched.cache_clear()
    yield put
    hub._fetched.cache_clear()


def test_cached_model_loads_without_a_network(cache: Cache, llama: Any) -> None:
    snapshot = cache("org/name", llama())
    source = resolve("org/name")
    assert source.checkpoint == snapshot
    assert (source.name, source.quant) == ("org/name", None)
    assert type(source.load(NF4)).__name__ == "LlamaForCausalLM"


def test_dtype_comes_from_the_weights_where_the_configuration_is_silent(cache: Cache, llama: Any) -> None:
    cache("org/name", llama(dtype=None, torch_dtype=None))
    assert resolve("org/name").unquantized_dtype == "bfloat16"
    assert resolve("org/name", dtype="fp16").unquantized_dtype == "float16"


def test_what_is_cached_is_checked(cache: Cache, llama: Any) -> None:
    folder = llama()
    (folder / "model.safetensors").unlink()
    (cache("org/bare", folder) / "x.txt").touch()
    with pytest.raises(UsageError, match="org/bare has no safetensors weights"):
        resolve("org/bare").load(NF4)
    assert type(resolve("org/bare", random_weights=True).load(NF4)).__name__ == "LlamaForCausalLM"
    (folder / "pytorch_model.bin").write_bytes(b"x")
    cache("org/pickled", folder)
    with pytest.raises(UsageError, match="give --allow-pickle"):
        resolve("org/pickled").load(NF4)
    assert resolve("org/pickled", allow_pickle=True).checkpoint.name == SHA
    (folder / "config.json").unlink()
    cache("org/files", folder)
    with pytest.raises(UsageError, match=r"org/files has no config\.json"):
        resolve("org/files")


def test_remote_code_needs_trust(cache: Cache, llama: Any) -> None:
    snapshot = cache("org/code", llama(auto_map={"AutoModelForCausalLM": "mine.Mine"}))
    with pytest.raises(UsageError, match="--trust-remote-code"):
        resolve("org/code")
    assert resolve("org/code", trust_remote_code=True).checkpoint == snapshot


def test_typos_get_a_hint_from_the_cache(cache: Cache, llama: Any) -> None:
    cache("org/some-model", llama())
    assert hub.cached() == ["org/some-model"]
    with pytest.raises(UsageError, match="did you mean org/some-model"):
        resolve("org/some-modle")
    with pytest.raises(UsageError, match=r"org/some-model at revision v2 is neither"):
        resolve("org/some-model", revision="v2")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.GatedRepoError, "is gated: accept its terms"),
        (errors.RevisionNotFoundError, "has no revision v2"),
        (errors.RepositoryNotFoundError, "the hub has no model org/name; a directory is written ./org/name"),
        (ConnectionError, "the hub cannot be reached"),
    ],
)
@pytest.mark.parametrize("bars", [True, False])
def test_what_the_hub_refuses_is_told_in_one_line(
    error: type[Exception], told: str, bars: bool, monkeypatch: pytest.MonkeyPatch, cache: Cache
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def refuse(*args: object, **kwargs: object) -> None:
        assert are_progress_bars_disabled()
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    (enable_progress_bars if bars else disable_progress_bars)()
    with pytest.raises(UsageError, match=told) as caught:
        resolve("org/name", revision="v2")
    assert "\n" not in str(caught.value)
    assert are_progress_bars_disabled() is not bars
    enable_progress_bars()


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Any) -> tuple[Path, Callable[[], set[str]]]:
    """A hub that serves the directory ``llama`` makes, and the names of the files that were fetched from it so far."""
    here, remote = tmp_path / "here", llama()
    here.mkdir()

    def serve(name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, revision, ignore_patterns) == ("org/name", "v2", ["*/*"])
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serve)
    hub._fetched.cache_clear()
    return remote, lambda: {file.name for file in here.iterdir()} - {"generation_config.json"}


def test_weights_are_fetched_when_they_are_needed_and_pickles_never_beside_them(online: Any) -> None:
    remote, fetched = online
    for extra in ("pytorch_model.bin", "mine.py"):
        (remote / extra).touch()
    source = resolve("org/name", revision="v2", allow_pickle=True)
    assert fetched() == {"config.json"}
    assert source.checkpoint.is_dir()
    assert fetched() == {"config.json", "model.safetensors"}


def test_pickles_are_fetched_where_they_are_allowed_and_all_there_is(online: Any) -> None:
    remote, fetched = online
    (remote / "model.safetensors").rename(remote / "pytorch_model.bin")
    with pytest.raises(UsageError, match="no safetensors weights; give --allow-pickle"):
        _ = resolve("org/name", revision="v2").checkpoint
    assert fetched() == {"config.json"}
    assert resolve("org/name", revision="v2", allow_pickle=True).checkpoint.is_dir()
    assert fetched() == {"config.json", "pytorch_model.bin"}


def test_code_is_fetched_where_it_is_trusted(online: Any) -> None:
    remote, fetched = online
    (remote / "mine.py").touch()
    assert resolve("org/name", revision="v2", trust_remote_code=True).checkpoint.is_dir()
    assert fetched() == {"config.json", "model.safetensors", "mine.py"}
