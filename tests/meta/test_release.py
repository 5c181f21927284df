"""A release: one place for the version, distributions that build each other, and commands that run where they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from kbitcheck.core.version import VERSION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAX_BYTES = 1_000_000  # of the wheel
OWN = ("kbitcheck", "_kbitcheck", "__editable__")
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "HF_HUB_OFFLINE": "1"}

needs_network = pytest.mark.skipif(
    not os.environ.get("KBITCHECK_NETWORK"), reason="builds in fresh environments from PyPI: set KBITCHECK_NETWORK=1"
)


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    path = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert path.read_text(encoding="utf-8").count(f'"{VERSION}"') == 1


def test_the_workflow_publishes_without_a_token() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["steps"][-1]["with"] == {"attestations": True}
    assert "secrets." not in str(workflow)


def run(*command: str | Path, cwd: Path) -> str:
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, f"{command}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with ``build`` and ``uv``."""
    folder = tmp_path_factory.mktemp("tools")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    run(folder / "bin" / "pip", "install", "--quiet", "build", "uv", cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def wheel(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist builds."""
    folder = tmp_path_factory.mktemp("dist")
    run(tools / "python", "-m", "build", "--outdir", folder, ROOT, cwd=folder)  # the wheel is built from the sdist
    assert (folder / f"kbitcheck-{VERSION}.tar.gz").exists()
    return folder / f"kbitcheck-{VERSION}-py3-none-any.whl"


def environment(folder: Path, tools: Path, wheel: Path, how: str, without: Sequence[str] = ()) -> Path:
    """The scripts of a fresh environment with the wheel. Its dependencies are links to this one's, but for some."""
    if how == "pip":
        run(sys.executable, "-m", "venv", folder / "fresh", cwd=folder)
        run(folder / "fresh" / "bin" / "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    else:
        run(tools / "uv", "venv", "--quiet", "--python", sys.executable, folder / "fresh", cwd=folder)
        python = folder / "fresh" / "bin" / "python"
        run(tools / "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel, cwd=folder)
    (folder / "dependencies").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((*OWN, *without)) and entry.suffix != ".pth":
            (folder / "dependencies" / entry.name).symlink_to(entry)
    [packages] = (folder / "fresh" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(str(folder / "dependencies"))
    return folder / "fresh" / "bin"


@pytest.mark.slow
@needs_network
@pytest.mark.parametrize("how", ["pip", "uv"])
def test_the_wheel_runs_outside_the_checkout(how: str, tools: Path, wheel: Path, tmp_path: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES
    scripts = environment(tmp_path, tools, wheel, how)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(scripts / "kbitcheck", "--version", cwd=empty) == f"kbitcheck {VERSION}\n"
    assert f"kbitcheck      {VERSION}" in run(scripts / "kbitcheck", "env", cwd=empty)
    audit = ("model", "tiny:llama", "--quant", "nf4", "--format", "json", "--output", "report.json")
    assert "✓ ready" in run(scripts / "kbitcheck", *audit, cwd=empty)
    run(scripts / "kbitcheck", "show", "report.json", "--format", "html", "--output", "report.html", cwd=empty)
    assert (empty / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    narrow = ("--kbit-impl=reference", "--kbit-model=tiny:llama", "--kbit-quant=nf4", "--kbit-checkpointing=off", "-q")
    assert "✓ conforms" in run(scripts / "python", "-m", "pytest", *narrow, "--kbit-select=KB1", cwd=empty)


@pytest.mark.slow
@needs_network
def test_without_a_quantizer_and_peft_it_starts_and_says_what_to_install(
    tools: Path, wheel: Path, tmp_path: Path
) -> None:
    scripts = environment(tmp_path, tools, wheel, "pip", without=("bitsandbytes", "peft"))
    run(scripts / "kbitcheck", "rules", cwd=tmp_path)
    assert "bitsandbytes is not installed: pip install bitsandbytes" in run(scripts / "kbitcheck", "env", cwd=tmp_path)
    for arguments, install in (
        (("model", "tiny:llama", "--quant", "nf4"), "pip install bitsandbytes"),
        (("impl", "peft", "--model", "tiny:llama"), "pip install 'kbitcheck[peft]'"),
    ):
        command = [str(scripts / "kbitcheck"), *arguments]
        ran = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr.count("\n")) == (4, 1), ran.stderr
        assert install in ran.stderr
