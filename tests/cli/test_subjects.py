"""Subjects in environments of their own: built from a wheel that is written here, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from tests.cli.conftest import Door

ONE = ("--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off")
SOURCE = "def prepare(model):\n    return model\nprepare.please = True\n__version__ = '1'\n"
BAD = "def prepare(model):\n    pass\n"


def wheel(folder: Path, source: str = SOURCE, *, needs: str = "", version: str = "1.0") -> Path:
    """A wheel of a package ``fork_prep`` that is one file."""
    folder.mkdir(exist_ok=True)
    path = folder / f"fork_prep-{version}-py3-none-any.whl"
    told = f"Metadata-Version: 2.1\nName: fork-prep\nVersion: {version}\n"
    files = {
        "fork_prep/__init__.py": source,
        f"fork_prep-{version}.dist-info/METADATA": told + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"fork_prep-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"fork_prep-{version}.dist-info/RECORD": record}.items():
            archive.writestr(name, text)
    return path


class Elsewhere(Door):
    """A door whose environments are below ``cache``, and that has neither network nor uv."""

    @property
    def cache(self) -> Path:
        return self.cwd.parent / "cache"

    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in super().environment().items() if not k.startswith(("PIP_", "UV_"))}
        none = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PATH": str(self.cwd)}
        return {**inherited, **none, "KBITCHECK_CACHE": str(self.cache)}

    def built(self) -> list[str]:
        """What is in the cache, less the locks: a file without content each."""
        return sorted(p.name for p in (self.cache / "environments").iterdir() if p.suffix != ".lock")


@pytest.fixture
def elsewhere(door: Door) -> Elsewhere:
    return Elsewhere(door.cwd, door.scratch)


def test_it_is_installed_once_and_judged(elsewhere: Elsewhere) -> None:
    name = f"{wheel(elsewhere.cwd.parent / 'w')}::fork_prep:prepare"
    first = elsewhere("impl", name, *ONE, "--format", "json")
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith(f"installing {name.partition('::')[0]} into an environment of its own, once\n")
    [folder] = elsewhere.built()
    told = json.loads(first.stdout)["subject"]["implementation"]
    assert (told["name"], told["version"]) == (name, "1.0")
    assert told["file"].startswith(str(elsewhere.cache / "environments" / folder / "lib"))
    second = elsewhere("impl", name, *ONE)
    assert (second.returncode, second.stderr) == (0, "✓ conforms: 4 kept, 1 not applicable\n")
    assert elsewhere.built() == [folder]
    assert elsewhere.left() == []


def test_a_changed_wheel_is_another_subject(elsewhere: Elsewhere) -> None:
    """A file keeps its name when it is built again; what is judged is what is in it now."""
    path = wheel(elsewhere.cwd.parent / "w")
    assert elsewhere("impl", f"{path}::fork_prep:prepare", *ONE).returncode == 0
    wheel(path.parent, BAD)
    again = elsewhere("impl", f"{path}::fork_prep:prepare", *ONE)
    assert again.returncode == 1
    assert "KB103 returns" in again.stdout
    assert len(elsewhere.built()) == 2


def test_the_subject_stands_before_what_is_in_the_working_directory(elsewhere: Elsewhere) -> None:
    path = wheel(elsewhere.cwd.parent / "w")
    (elsewhere.cwd / "fork_prep.py").write_text(BAD)
    assert elsewhere("impl", f"{path}::fork_prep:prepare", *ONE).returncode == 0


WRONG = [
    ("{wheel}::fork_prep:nothing", "fork_prep has no attribute 'nothing'"),
    ("{wheel}::no_such_module:prepare", "No module named 'no_such_module'"),
    ("{wheel}::fork_prep.inner:prepare", "No module named 'fork_prep.inner'"),
    ("{wheel}::fork_prep:__version__", "is a str, which cannot be called"),
    ("{wheel}::fork_prep", "names no function"),
    ("{wheel}::", "names no function"),
    ("::fork_prep:prepare", "names nothing to install"),
    ("no_such_directory/::fork_prep:prepare", "no such file"),
    ("./no_such_directory::fork_prep:prepare", "no such file or directory"),
    ("nobodys-package-at-all==1.0::a:b", "cannot be installed: "),
    ("nobodys-package-at-all==1.0", "write nobodys-package-at-all==1.0::module:function"),
    ("what is this::a:b", "is no requirement"),
    ("{needs}::fork_prep:prepare", "torch"),
]


@pytest.mark.parametrize(("name", "told"), WRONG, ids=[name for name, _ in WRONG])
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(elsewhere: Elsewhere, name: str, told: str) -> None:
    given = wheel(elsewhere.cwd.parent / "w")
    needs = wheel(elsewhere.cwd.parent / "n", needs="torch<1")
    run = elsewhere("impl", name.format(wheel=given, needs=needs), *ONE)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("installing ")]
    assert (run.returncode, len(lines), run.stdout) == (4, 1, ""), run.stderr
    assert told in lines[0]
    assert not elsewhere.cache.exists() or elsewhere.built() == []
    assert elsewhere.left() == []


def test_an_interrupted_build_leaves_nothing_and_the_next_one_builds(elsewhere: Elsewhere) -> None:
    """Killed outright, not even Python tidies up: what stays must not be taken for an environment."""
    slow = (
        "import os, time\nif not os.path.exists('go'):\n    open('here', 'w').close()\n    time.sleep(600)\n" + SOURCE
    )
    name = f"{wheel(elsewhere.cwd.parent / 'w', slow)}::fork_prep:prepare"
    for stop in ("kill", "terminate"):
        with elsewhere.start("impl", name, *ONE) as process:
            while not (elsewhere.cwd / "here").exists():
                assert process.poll() is None
                threading.Event().wait(0.02)
            getattr(process, stop)()
            process.communicate(timeout=30)
        (elsewhere.cwd / "here").unlink()
        assert process.returncode == (-9 if stop == "kill" else 2)
        drafts = elsewhere.built()
        assert all(draft.endswith(".draft") for draft in drafts)
        assert stop == "kill" or drafts == []
    (elsewhere.cwd / "go").write_text("")
    assert elsewhere("impl", name, *ONE).returncode == 0
    assert [name.endswith(".draft") for name in elsewhere.built()] == [False]


def test_two_at_once_build_it_once(elsewhere: Elsewhere) -> None:
    counts = "open('loads', 'a').write('.')\n" + SOURCE
    name = f"{wheel(elsewhere.cwd.parent / 'w', counts)}::fork_prep:prepare"
    started = [elsewhere.start("impl", name, *ONE) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert sum("into an environment of its own" in err for _, err in ended) == 1
    assert len(elsewhere.built()) == 1
    assert (elsewhere.cwd / "loads").read_text() == "..."  # one build, two runs


@pytest.mark.parametrize("against", ["good.py:prepare", "{wheel}::fork_prep:prepare"])
def test_the_gate_compares_it(elsewhere: Elsewhere, against: str) -> None:
    good = wheel(elsewhere.cwd.parent / "w")
    bad = wheel(elsewhere.cwd.parent / "v", BAD, version="2.0")
    against = against.format(wheel=good)
    better = elsewhere("gate", f"{good}::fork_prep:prepare", "--against", against, *ONE)
    assert better.returncode == 0, better.stdout + better.stderr
    worse = elsewhere("gate", f"{bad}::fork_prep:prepare", "--against", against, *ONE)
    assert (worse.returncode, "✗ regressed KB103" in worse.stdout) == (1, True)
    ledger = ("gate", f"{good}::fork_prep:prepare", "--ledger", "ledger.toml", *ONE)
    assert elsewhere(*ledger, "--accept").returncode == 0
    assert elsewhere(*ledger).returncode == 0


def test_a_model_is_prepared_by_it_and_what_is_drawn_too(elsewhere: Elsewhere) -> None:
    bad = f"{wheel(elsewhere.cwd.parent / 'w', BAD)}::fork_prep:prepare"
    run = elsewhere("model", "tiny:llama", "--prepare", bad)
    assert (run.returncode, f"--prepare {bad}" in run.stdout) == (1, True), run.stderr
    drawn = elsewhere("impl", bad, "--fuzz", "3", "--model", "tiny:llama")
    assert (drawn.returncode, "KB103 returns" in drawn.stdout) == (1, True), drawn.stderr
    inside = elsewhere("impl", bad, "--in-process", *ONE)
    assert (inside.returncode, inside.stderr.count("\n")) == (4, 1)
    assert "environment of its own" in inside.stderr


def test_an_adapter_file_may_stand_between(elsewhere: Elsewhere) -> None:
    """A file of the user's, imported beside what was installed."""
    path = wheel(elsewhere.cwd.parent / "w")
    (elsewhere.cwd / "adapter.py").write_text("import fork_prep\nprepare = fork_prep.prepare\n")
    run = elsewhere("impl", f"{path}::adapter.py:prepare", *ONE)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("form", ["directory", "branch"])
def test_a_checkout_is_installed_as_it_is_now(elsewhere: Elsewhere, form: str) -> None:
    """Building from source wants a build backend, here one that is in the tree."""
    tree = elsewhere.cwd.parent / "fork"
    wheel(tree)
    (tree / "backend.py").write_text(
        "import shutil, zipfile, os\n"
        "def build_wheel(folder, *_):\n"
        "    name = 'fork_prep-1.0-py3-none-any.whl'\n"
        "    shutil.copy(name, folder)\n"
        "    with zipfile.ZipFile(os.path.join(folder, name), 'a') as archive:\n"
        "        archive.write('fork_prep.txt', 'fork_prep/inner.py')\n"
        "    return name\n"
    )
    (tree / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tree / "fork_prep.txt").write_text(SOURCE)
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org")
    name = str(tree)
    if form == "branch":
        for words in (("init", "-q", "-b", "trunk"), ("add", "-A"), ("commit", "-qm", "one")):
            subprocess.run([*git, *words], cwd=tree, check=True)
        name = f"git+file://{tree}@trunk"
    os.symlink("/usr/bin/git", elsewhere.cwd / "git")
    assert elsewhere("impl", f"{name}::fork_prep.inner:prepare", *ONE).returncode == 0
    (tree / "fork_prep.txt").write_text(BAD)
    if form == "branch":
        subprocess.run([*git, "commit", "-qam", "two"], cwd=tree, check=True)
    again = elsewhere("impl", f"{name}::fork_prep.inner:prepare", *ONE)
    assert again.returncode == 1, again.stderr
