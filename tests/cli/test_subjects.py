"""Subjects in environments of their own: built from a wheel that is written here, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from kbitcheck.report.report_folder import file_name
from tests.cli.conftest import Door

ONE = ("--model", "tiny:llama", "--quant", "nf4", "--checkpointing", "off")
shares_the_shelf = pytest.mark.xdist_group("shelf")  # or each of pytest's workers builds its own
SOURCE = "def prepare(model):\n    return model\nprepare.please = True\n__version__ = '1'\n"
WHEEL = "fork_prep-1.0-py3-none-any.whl"
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
    return Elsewhere(door.cwd, door.scratch, door.stubbed)


@dataclass(frozen=True)
class Shop(Elsewhere):
    """Where building is not what is tested: ``good`` and ``bad`` are wheels, built once for all tests."""

    shelf: Path

    @property
    def cache(self) -> Path:
        return self.shelf / "cache"

    @property
    def good(self) -> str:
        return f"{self.shelf / 'good' / WHEEL}::fork_prep:prepare"

    @property
    def bad(self) -> str:
        return f"{self.shelf / 'bad' / WHEEL}::fork_prep:prepare"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shelf = tmp_path_factory.mktemp("shelf")
    wheel(shelf / "good")
    wheel(shelf / "bad", BAD)
    return shelf


@pytest.fixture
def shop(door: Door, shelf: Path) -> Shop:
    return Shop(door.cwd, door.scratch, door.stubbed, shelf)


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


@pytest.mark.slow
def test_a_changed_wheel_is_another_subject(elsewhere: Elsewhere) -> None:
    """A file keeps its name when it is built again; what is judged is what is in it now."""
    path = wheel(elsewhere.cwd.parent / "w")
    assert elsewhere("impl", f"{path}::fork_prep:prepare", *ONE).returncode == 0
    wheel(path.parent, BAD)
    again = elsewhere("impl", f"{path}::fork_prep:prepare", *ONE)
    assert again.returncode == 1
    assert "KB103 returns" in again.stdout
    assert len(elsewhere.built()) == 2


WRONG = [
    ("{wheel}::fork_prep:nothing", "fork_prep has no attribute 'nothing'"),
    ("{wheel}::fork_prep", "names no function"),
    ("{wheel}::", "names no function"),
    ("::fork_prep:prepare", "names nothing to install"),
    ("no_such_directory/::fork_prep:prepare", "no such file"),
    ("./no_such_directory::fork_prep:prepare", "no such file or directory"),
    ("nobodys-package-at-all==1.0::a:b", "cannot be installed: "),
    ("nobodys-package-at-all==1.0", "write nobodys-package-at-all==1.0::module:function"),
    ("what is this::a:b", "is no requirement"),
    ("{needs}::fork_prep:prepare", "fork-prep 1.0 depends on torch<1"),
    # An environment is built for each; ``impl`` says the same of a function without one.
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            ("{wheel}::no_such_module:prepare", "no module named 'no_such_module'"),
            ("{wheel}::fork_prep.inner:prepare", "no module named 'fork_prep.inner'"),
            ("{wheel}::fork_prep:__version__", "is a str, which cannot be called"),
            ("{elder}::fork_prep:prepare", "fork-prep 1.0 depends on transformers<4"),
        )
    ),
]


@pytest.mark.parametrize(("name", "told"), WRONG)
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(elsewhere: Elsewhere, name: str, told: str) -> None:
    given = wheel(elsewhere.cwd.parent / "w")
    needs = wheel(elsewhere.cwd.parent / "n", needs="torch<1")
    elder = wheel(elsewhere.cwd.parent / "e", needs="transformers<4")
    run = elsewhere("impl", name.format(wheel=given, needs=needs, elder=elder), *ONE)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("installing ")]
    assert (run.returncode, len(lines), run.stdout) == (4, 1, ""), run.stderr
    assert told in lines[0]
    assert not elsewhere.cache.exists() or elsewhere.built() == []
    assert elsewhere.left() == []


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_at_once_build_it_once(elsewhere: Elsewhere) -> None:
    counts = "open('loads', 'a').write('.')\n" + SOURCE
    name = f"{wheel(elsewhere.cwd.parent / 'w', counts)}::fork_prep:prepare"
    started = [elsewhere.start("impl", name, *ONE) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert sum("into an environment of its own" in err for _, err in ended) == 1
    assert len(elsewhere.built()) == 1
    assert (elsewhere.cwd / "loads").read_text() == "..."  # one build, two runs


@shares_the_shelf
@pytest.mark.slow
@pytest.mark.parametrize("other", ["installed", "fork"])
def test_the_gate_compares_it(shop: Shop, other: str) -> None:
    against = shop.good if other == "fork" else "good.py:prepare"
    better = shop("gate", shop.good, "--against", against, *ONE)
    assert better.returncode == 0, better.stdout + better.stderr
    worse = shop("gate", shop.bad, "--against", against, *ONE)
    assert (worse.returncode, "✗ regressed KB103" in worse.stdout) == (1, True)


@shares_the_shelf
def test_a_ledger_is_kept_of_it(shop: Shop) -> None:
    ledger = ("gate", shop.good, "--ledger", "ledger.toml", *ONE)
    assert shop(*ledger, "--accept").returncode == 0
    again = shop(*ledger)
    assert (again.returncode, "nothing changed" in again.stderr) == (0, True), again.stderr


@shares_the_shelf
def test_a_model_is_prepared_by_it_and_what_is_drawn_too(shop: Shop) -> None:
    run = shop("model", "tiny:llama", "--prepare", shop.bad)
    assert (run.returncode, f"--prepare {shop.bad}" in run.stdout) == (1, True), run.stderr
    drawn = shop("impl", shop.bad, "--fuzz", "3", "--model", "tiny:llama")
    assert (drawn.returncode, "KB103 returns" in drawn.stdout) == (1, True), drawn.stderr
    inside = shop("impl", shop.bad, "--in-process", *ONE)
    assert (inside.returncode, inside.stderr.count("\n")) == (4, 1)
    assert "environment of its own" in inside.stderr


@shares_the_shelf
def test_an_adapter_file_may_stand_between(shop: Shop) -> None:
    """A file of the user's, imported beside what was installed."""
    (shop.cwd / "adapter.py").write_text("import fork_prep\nprepare = fork_prep.prepare\n")
    run = shop("impl", f"{shop.good.partition('::')[0]}::adapter.py:prepare", *ONE)
    assert run.returncode == 0, run.stderr


@shares_the_shelf
def test_the_subject_stands_before_what_is_in_the_working_directory(shop: Shop) -> None:
    (shop.cwd / "fork_prep.py").write_text(BAD)
    assert shop("impl", shop.good, *ONE).returncode == 0


@shares_the_shelf
@pytest.mark.slow
def test_a_matrix_has_a_row_for_each(shop: Shop) -> None:
    """Those that cannot be had are rows too; the table is the same in every format."""
    gone = f"{shop.good.partition('::')[0]}::fork_prep:nothing"
    (shop.cwd / "list.toml").write_text(f'[[subject]]\nname = "worse"\nimplementation = "{shop.bad}"\n')
    names = ("rude.py:prepare", shop.good, "list.toml", "import_error.py:prepare", gone)
    ran = shop("matrix", *names, *ONE, "--format", "json", "--output", "m.json", "--reports", "out/reports")
    assert (ran.returncode, ran.stdout) == (1, ""), ran.stderr
    reports = sorted((shop.cwd / "out" / "reports").iterdir())
    assert [path.name for path in reports] == sorted(
        f"{file_name(name)}.json" for name in (names[0], shop.good, "worse")
    )
    assert json.loads((shop.cwd / "out" / "reports" / "worse.json").read_text())["exit_code"] == 1
    table = json.loads((shop.cwd / "m.json").read_text())
    assert [row["subject"]["name"] for row in table["rows"]] == ["rude.py:prepare", shop.good, "worse", *names[3:]]
    kept = {"KB101": "kept", "KB102": "skipped", "KB103": "kept", "KB201": "kept", "KB901": "kept"}
    rude, good, worse, *broken = table["rows"]
    assert rude["marks"] == {**kept, "KB201": "broken SHOULD"}
    assert good["marks"] == kept
    assert worse["marks"] == {**kept, "KB103": "broken MUST", "KB201": "broken SHOULD"}
    assert worse["broken"] == {
        "KB103": {"tiny:llama-nf4-off": "prepare: expected the model, found None"},
        "KB201": {"tiny:llama-nf4-off": "prepare.please: expected please, found nothing"},
    }
    assert ["no_such_module_anywhere" in broken[0]["error"], "no attribute" in broken[1]["error"]] == [True, True]
    assert (table["cases"], table["exit_code"]) == (["tiny:llama-nf4-off"], 1)
    told = [shop("matrix", *names, *ONE, "--format", form).stdout for form in ("text", "markdown", "html")]
    for text in told:
        assert all(word in text for word in ("KB103", "MUST", "worse", "no_such_module_anywhere", "KB101"))
        assert "KB201" in text
    assert "| worse | 5" in told[1] or "| worse |" in told[1]


MATRIX = [
    (("good.py:prepare",), 0),
    (("good.py:prepare", "--select", "KB102"), 5),
    (("nothing.py:prepare",), 1),
    (("leaves.py:prepare",), 1),
    (("killed.py:prepare",), 3),
    (("half_judged.py:prepare",), 1),
    (("killed.py:prepare", "nothing.py:prepare"), 1),
    (("import_error.py:prepare", "rude.py:prepare"), 3),
    ((), 4),
    (("good.py:prepare", "good.py:prepare"), 4),
    (("good.py:prepare", "--in-process"), 4),
    (("good.py:prepare", "--format", "sarif"), 4),
    (("none.toml",), 4),
    (("bad.toml",), 4),
    (("odd.toml",), 4),
    (("good.py:prepare", "--reports", "good.py"), 4),
    (("good.py:prepare", "Good.py:prepare", "--reports", "out"), 4),
    (("empty.toml",), 4),
]


@pytest.mark.parametrize(("arguments", "code"), MATRIX, ids=[" ".join(a) or "nothing" for a, _ in MATRIX])
def test_how_a_matrix_ends(door: Door, arguments: tuple[str, ...], code: int) -> None:
    (door.cwd / "bad.toml").write_text("a = [")
    (door.cwd / "odd.toml").write_text('[[subject]]\nname = "no implementation"\n')
    (door.cwd / "empty.toml").write_text("")
    ran = door("matrix", *arguments, *ONE)
    assert (ran.returncode, bool(ran.stdout)) == (code, code != 4), ran.stderr
    assert code != 4 or ran.stderr.count("\n") == 1


@pytest.mark.slow
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
    (elsewhere.cwd / "git").symlink_to("/usr/bin/git")
    assert elsewhere("impl", f"{name}::fork_prep.inner:prepare", *ONE).returncode == 0
    (tree / "fork_prep.txt").write_text(BAD)
    if form == "branch":
        subprocess.run([*git, "commit", "-qam", "two"], cwd=tree, check=True)
    again = elsewhere("impl", f"{name}::fork_prep.inner:prepare", *ONE)
    assert again.returncode == 1, again.stderr
