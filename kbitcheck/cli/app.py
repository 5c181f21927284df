"""The commands, and which of them a command line names. A command's module is imported when the command is run."""

import argparse
import contextlib
from collections.abc import Sequence
from importlib import import_module

from kbitcheck.cli.options import Parser, RunOptions, add_options
from kbitcheck.core.report import EXIT_CONFORMS, EXIT_USAGE
from kbitcheck.core.suggest import did_you_mean
from kbitcheck.core.version import TOOL

START = """Start:
  kbitcheck model tiny:llama --quant nf4
  kbitcheck COMMAND --help"""
HELP_ALL = "--help-all"
COMMANDS = {
    "model": "Will this model survive k-bit preparation and train, and what will it cost?",
    "impl": "Does this preparation function keep the specification?",
    "watch": "Watch a training script from inside: does it train what it should?",
    "adapter": "Look at a saved adapter: did it train, and does it fit its base?",
    "gate": "Has an implementation changed since its results were accepted?",
    "matrix": "Which rules do several implementations or releases keep?",
    "diff": "Compare two saved reports: did anything get worse?",
    "backends": "Which quantization methods are there, what can train, and what is judged of each?",
    "config": "Which configuration holds here, and where does each value come from?",
    "env": "What a report of a defect needs to say: versions, processor, devices, quantizers.",
    "completion": "Print what makes bash, zsh or fish complete commands, options and their values.",
    "init": "Write a project's configuration, CI workflow and first ledger.",
    "rules": "List the rules, or explain one.",
    "selftest": "Prove on this machine that every rule catches its faults.",
    "sweep": "Audit every architecture of transformers, tiny and with random weights.",
    "show": "Render a saved report.",
    "badge": "Write the JSON from which a badge service draws a saved report's verdict.",
}


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit code."""
    if not arguments:
        overview().print_help()
        return EXIT_USAGE
    name, *rest = arguments
    if name in COMMANDS:
        return run_command(name, rest)
    parser = overview()
    flags = parser._option_string_actions
    if name not in flags:
        kind, names = ("option", [*flags]) if name.startswith("-") else ("command", [*COMMANDS])
        parser.error(f"No such {kind}: {name}{did_you_mean(name, names) or _with_command(name)}")
    with contextlib.suppress(SystemExit):  # --help and --version end so
        parser.parse_args([name])
    return EXIT_CONFORMS


def _with_command(word: str) -> str:
    """What may be meant by a model or an implementation where a command should stand."""
    if word.startswith("-") or not {":", "/"} & {*word}:
        return ""
    command = "impl" if ":" in word and not word.startswith("tiny:") else "model"
    return f" (did you mean kbitcheck {command} {word}?)"


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run one command with its own arguments; returns its exit code."""
    command = import_module(f"kbitcheck.cli.commands.{name}")
    parser = Parser(prog=f"kbitcheck {name}", description=COMMANDS[name])
    full = HELP_ALL in arguments[: arguments.index("--") if "--" in arguments else None]
    add_options(parser, command.Options, name, full=full)
    typed = parser.parse(["--help"] if full else arguments)
    if typed is None:
        return EXIT_CONFORMS
    if not issubclass(command.Options, RunOptions):
        return int(command.run(command.Options(**typed)))
    from kbitcheck.cli.configured import configured  # the other commands have no use for it

    return int(command.run(configured(command.Options, typed)))


def overview() -> Parser:
    """The parser of a command line that names no command."""
    parser = Parser(prog="kbitcheck", description="Conformance tests for k-bit preparation.", epilog=START)
    parser.add_argument("--version", action="version", version=TOOL, help="show the version and exit")
    commands = parser.add_subparsers(title="Commands", metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser
