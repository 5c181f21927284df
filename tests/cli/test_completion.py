"""Shells complete commands, options and values: bash, zsh and fish themselves are asked, where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kbitcheck.core.rule import rules

LINES = [
    ("kbitcheck mod", {"model"}),
    ("kbitcheck model tiny:llam", {"tiny:llama"}),
    ("kbitcheck model org/na", {"org/name"}),
    ("kbitcheck model --checkp", {"--checkpointing"}),
    ("kbitcheck impl reference --checkpointing re", {"reentrant"}),
    ("kbitcheck impl refe", {"reference"}),
    ("kbitcheck impl x --quant int", {"int8"}),
    ("kbitcheck rules KB10", {code for code in rules() if code.startswith("KB10")}),
    ("kbitcheck show repo", {"report.json"}),
    ("kbitcheck model x --batch ", set()),
]

BASH = """
source {script}
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:'
_kbitcheck
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def shell_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the scripts of the shells, the command, a report, and a hub cache with one model."""
    folder = tmp_path_factory.mktemp("shells")
    for shell in ("bash", "zsh", "fish"):
        command = [sys.executable, "-m", "kbitcheck", "completion", shell]
        (folder / f"completion.{shell}").write_text(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    (folder / "bin").mkdir()
    (folder / "bin" / "kbitcheck").write_text(f'#!/bin/sh\nexec {sys.executable} -m kbitcheck "$@"\n')
    (folder / "bin" / "kbitcheck").chmod(0o755)
    (folder / "report.json").write_text("{}")
    (folder / "hub" / "models--org--name").mkdir(parents=True)
    return folder


def answers(folder: Path, *command: str) -> set[str]:
    environment = {
        **os.environ, "HF_HUB_CACHE": str(folder / "hub"), "HOME": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    ran = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""
    return {line.partition("\t")[0].strip() for line in ran.stdout.splitlines()} - {""}


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@needs("bash")
@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_bash(shell_folder: Path, line: str, words: set[str]) -> None:
    script = BASH.format(script="completion.bash", line=line)
    behind_colon = {word.rpartition(":")[2] for word in words}  # bash replaces what stands behind its last separator
    assert answers(shell_folder, "bash", "--norc", "-c", script) == behind_colon


@needs("fish")
@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_fish(shell_folder: Path, line: str, words: set[str]) -> None:
    script = f"source completion.fish; complete -C {line!r}"
    assert answers(shell_folder, "fish", "--no-config", "-c", script) == words


ZSH = """
autoload -Uz compinit; compinit -u -D
compadd() {{ while [[ "$1" != -- ]]; do shift; done; shift; print -l -- ${{(M)@:#$PREFIX*}} }}
_files() {{ print -l -- $PREFIX*(N) }}
source completion.zsh
words=({words}); CURRENT=${{#words}}; PREFIX=${{words[CURRENT]}}
_kbitcheck
"""


@needs("zsh")
@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_zsh(shell_folder: Path, line: str, words: set[str]) -> None:
    """The function itself, on stand-ins for the two builtins that are there while a line is edited alone."""
    typed = " ".join(repr(word) for word in line.split(" "))
    assert answers(shell_folder, "zsh", "-f", "-c", ZSH.format(words=typed)) == words
