"""``kbitcheck init``."""

from dataclasses import dataclass
from pathlib import Path

from kbitcheck.cli.cases import examine, suite_cases
from kbitcheck.cli.commands import gate
from kbitcheck.cli.configured import configured
from kbitcheck.cli.console import say
from kbitcheck.cli.options import argument, option
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import EXIT_CONFORMS
from kbitcheck.core.result import Level, Status
from kbitcheck.report.output_file import OutputFile
from kbitcheck.run.candidates import candidates
from kbitcheck.run.configuration import OWN_FILE, read
from kbitcheck.run.subject import validate

LEDGER = "kbitcheck-ledger.toml"
WORKFLOW = Path(".github", "workflows", "kbitcheck.yml")

CONFIGURATION = """\
# What kbitcheck judges here; `kbitcheck config` shows what holds, and the command line replaces it.
implementation = "{implementation}"
ledger = "{ledger}"
"""

STEPS = """\
# Fails where the preparation keeps a rule no longer that it kept when the ledger was accepted.
name: kbitcheck
on:
  push:
    branches: [main]
  pull_request:
permissions:
  contents: read
jobs:
  gate:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v5
      - uses: actions/setup-python@v6
        with:
          python-version: "3.11"
          cache: pip
      # Where no package index that you use has kbitcheck: its checkout or its address instead, as in '/path/to/kbitcheck[peft]'.
      - run: pip install --extra-index-url https://download.pytorch.org/whl/cpu {project}'kbitcheck[peft]'
      - run: kbitcheck gate
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    impl: str = argument(
        "[IMPL]", "The preparation; default: the one in this project's sources.", default="", nargs="?"
    )
    no_ledger: bool = option("Write no ledger, which takes a run of the quick suite.", False)
    debug: bool = option("Show tracebacks and what the worker prints.", False)


def run(options: Options) -> int:
    """Write the configuration, a CI workflow and the first ledger; what is there already stays as it is."""
    configuration = read()
    implementation = options.impl or str(configuration.get("implementation", "")) or only(candidates(Path.cwd()))
    validate(implementation)
    ledger = configuration.ledger_of(implementation) or LEDGER
    if configuration:
        file = next(iter(configuration.settings.values())).origin
        say(f"{file} is there already, and stays as it is")
        missing = {"implementation": implementation, "ledger": ledger}.items() - configuration.items()
        for key, value in sorted(missing):
            say(f'write into it: {key} = "{value}"')
    else:
        create(Path(OWN_FILE), CONFIGURATION.format(implementation=implementation, ledger=ledger))
    project = ". " if any(Path(name).exists() for name in ("pyproject.toml", "setup.py")) else ""
    create(WORKFLOW, STEPS.format(project=project))
    if Path(ledger).exists():
        say(f"{ledger} is there already, and stays as it is")
    elif not options.no_ledger:
        return accept(implementation, ledger, debug=options.debug)
    return EXIT_CONFORMS


def only(names: list[str]) -> str:
    """The one candidate."""
    if len(names) == 1:
        return names[0]
    several = f"there are several: {', '.join(names)}; " if names else "no function here looks like a preparation; "
    raise UsageError(f"{several}write kbitcheck init IMPL, such as kbitcheck init {names[0] if names else 'peft'}")


def create(path: Path, text: str) -> None:
    """Write a file that is not there yet."""
    if path.exists():
        say(f"{path} is there already, and stays as it is")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    OutputFile(str(path), "").write(text)
    say(f"{path} is written")


def accept(implementation: str, ledger: str, *, debug: bool) -> int:
    """Run the gate and accept what it yields; a conforming exit code where the ledger is written."""
    say("the first ledger is a run of the quick suite: a minute or two on a CPU")
    options = configured(gate.Options, {"impl": implementation, "ledger": ledger, "accept": True, "debug": debug})
    specs = suite_cases(implementation, options)
    report = gate.accepting(ledger, specs)(examine("gate", specs, options, blame="own"))
    if not Path(ledger).exists():
        return report.exit_code
    broken = {r.rule for r in report.results if r.own and r.status is Status.FAIL and r.level is Level.MUST}
    if broken:
        say(f"broken MUSTs of {implementation}: {', '.join(sorted(broken))}; mend these before you write reasons")
    return EXIT_CONFORMS
