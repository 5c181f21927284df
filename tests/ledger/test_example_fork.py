"""The example fork: its CI is green as it stands, and goes red on a one-line regression."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "fork"
GOOD = "reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)"
BAD = "reference(model, use_gradient_checkpointing)"


def ci_command() -> list[str]:
    """The gate's command line in the example's workflow."""
    workflow = yaml.safe_load((EXAMPLE / ".github" / "workflows" / "ci.yml").read_text())
    (line,) = [s["run"] for s in workflow["jobs"]["test"]["steps"] if s.get("run", "").startswith("kbitcheck ")]
    return shlex.split(line)[1:]


def test_the_fork_is_a_dozen_lines_and_its_readme_shows_the_command() -> None:
    source = (EXAMPLE / "fork_prep" / "__init__.py").read_text().splitlines()
    assert len([line for line in source if line.strip()]) <= 12
    assert "$ kbitcheck " + shlex.join(ci_command()) in (EXAMPLE / "README.md").read_text()


@pytest.mark.slow
def test_a_one_line_regression_turns_the_ci_red(tmp_path: Path) -> None:
    fork = shutil.copytree(EXAMPLE, tmp_path / "fork", ignore=shutil.ignore_patterns("__pycache__"))
    ledger = (fork / "kbitcheck-ledger.toml").read_bytes()

    def ci() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kbitcheck", *ci_command()],
            cwd=fork,
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    green = ci()
    assert green.returncode == 0, green.stdout + green.stderr
    source = fork / "fork_prep" / "__init__.py"
    text = source.read_text()
    assert text.count(GOOD) == 1
    source.write_text(text.replace(GOOD, BAD))
    red = ci()
    assert red.returncode == 1, red.stdout + red.stderr
    assert "✗ regressed KB404 kwargs-honoured [tiny:gpt2-nf4-non-reentrant]" in red.stdout
    assert red.stderr == "✗ changed against kbitcheck-ledger.toml: 1 regressed\n"
    assert (fork / "kbitcheck-ledger.toml").read_bytes() == ledger


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-actions", ROOT / "action.yml"),
        ("vendor.github-workflows", EXAMPLE / ".github" / "workflows" / "ci.yml"),
        ("vendor.github-workflows", ROOT / ".github" / "workflows" / "ci.yml"),
        ("custom.github-workflows-require-timeout", ROOT / ".github" / "workflows" / "ci.yml"),
        ("vendor.github-workflows", ROOT / ".github" / "workflows" / "publish.yml"),
        ("vendor.github-workflows", ROOT / ".github" / "workflows" / "results.yml"),
        ("custom.github-workflows-require-timeout", ROOT / ".github" / "workflows" / "results.yml"),
    ],
    ids=[
        "action",
        "the example's workflow",
        "workflow",
        "its time limits",
        "publish",
        "results",
        "results' time limits",
    ],
)
def test_action_and_workflow_keep_their_schemas(schema: str, path: Path) -> None:
    keeps(schema, path)


def test_the_recipes_of_the_docs_keep_their_schemas(tmp_path: Path) -> None:
    """A list of steps is put into a job, and jobs into a workflow."""
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    github, comment, gitlab = (
        yaml.safe_load(textwrap.dedent(b)) for b in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    )
    job = {"runs-on": "ubuntu-latest", "steps": comment}
    workflow = {"on": "push", "jobs": {**github["jobs"], "comment": job}}
    for schema, recipe in (("vendor.github-workflows", workflow), ("vendor.gitlab-ci", gitlab)):
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
        keeps(schema, tmp_path / "recipe.yml")
    known = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    (given,) = [s["with"] for s in github["jobs"]["kbitcheck"]["steps"] if "kbitcheck" in s["uses"]]
    assert set(given) <= set(known["inputs"])
    assert f"outputs.{next(iter(set(known['outputs']) - {'exit-code'}))}" in comment[0]["run"]


def keeps(schema: str, path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_broken_action_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "action.yml").write_text((ROOT / "action.yml").read_text().replace("using: composite", "using: shell"))
    with pytest.raises(AssertionError):
        keeps("vendor.github-actions", tmp_path / "action.yml")


def test_what_is_committed_is_checked_as_it_is_linted() -> None:
    """Each hook runs what ``make lint`` runs."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook["entry"].split() for repo in config["repos"] for hook in repo["hooks"]}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint is not None
    linters = [line.replace("$(BIN)/", "").split() for line in lint[1].splitlines()]
    for tool, *arguments in linters:
        words = [tool, *arguments[:1]] if tool == "ruff" else [tool]
        assert any(entry[0].endswith(f"/{tool}") and entry[1 : len(words)] == words[1:] for entry in hooks.values()), (
            words
        )


def test_the_actions_script_ends_with_the_commands_code(tmp_path: Path) -> None:
    """Run the composite action's own steps on a stand-in for the command."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    script = next(s["run"] for s in steps if s.get("id") == "run")
    stub = tmp_path / "bin" / "kbitcheck"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/sh\necho "$@" >> calls\n[ "$1" = show ] && exit 0\n[ "$1" = config ] && exit 0\nfor f; do :; done; touch "$f"; exit 3\n'
    )
    stub.chmod(0o755)
    places = {n: str(tmp_path / n) for n in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    environment = {
        "IMPL": "a:b",
        "LEDGER": "l.toml",
        "ARGS": "--ignore 'KB505=two words'",
        "RUNNER_TEMP": str(tmp_path),
    }
    subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, **places, **environment, "PATH": f"{stub.parent}:{os.environ['PATH']}"},
        check=True,
    )
    outputs = dict(line.split("=", 1) for line in (tmp_path / "GITHUB_OUTPUT").read_text().splitlines())
    assert outputs == {
        "exit-code": "3",
        "report": f"{tmp_path}/kbitcheck.json",
        "sarif": f"{tmp_path}/kbitcheck.sarif",
    }
    # hashFiles() sees nothing outside the workspace, so steps pass paths on as outputs.
    assert "hashFiles(format" not in (ROOT / "action.yml").read_text()
    used = set(re.findall(r"steps\.run\.outputs\.([\w-]+)", (ROOT / "action.yml").read_text()))
    assert used <= set(outputs)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "config implementation"
    assert calls[1].startswith("gate a:b --ledger l.toml --ignore KB505=two words --format json")
    assert [" ".join(c.split()[2:4]) for c in calls[2:]] == ["", "--format markdown", "--format sarif"]


@pytest.mark.parametrize(
    ("impl", "ledger", "command"),
    [
        ("", "", "gate --ledger own.toml"),
        ("a:b", "", "gate a:b --ledger own.toml"),
        ("c:d", "", "impl c:d"),
        ("c:d", "l.toml", "gate c:d --ledger l.toml"),
    ],
)
def test_the_action_takes_what_it_has_no_input_for_from_the_configuration(
    tmp_path: Path, impl: str, ledger: str, command: str
) -> None:
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    script = next(s["run"] for s in steps if s.get("id") == "run")
    (tmp_path / "kbitcheck").write_text(
        '#!/bin/sh\n[ "$*" = "config ledger" ] && echo own.toml && exit\n'
        '[ "$*" = "config implementation" ] && echo a:b && exit\necho "$@" >> calls\n'
    )
    (tmp_path / "kbitcheck").chmod(0o755)
    environment = {
        **os.environ, "IMPL": impl, "LEDGER": ledger, "ARGS": "", "RUNNER_TEMP": str(tmp_path),
        "GITHUB_OUTPUT": str(tmp_path / "output"), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "calls").read_text().startswith(f"{command} --format json")
