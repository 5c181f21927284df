"""Scripts by which bash, zsh and fish complete commands, options and their values.

What a version of kbitcheck has stands in the script; the models of the hub's cache are looked up when they are wanted.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module

from kbitcheck.backends import registry
from kbitcheck.cli.app import COMMANDS
from kbitcheck.core.memory_sizes import GPUS
from kbitcheck.core.rule import rules
from kbitcheck.models.sources import recipe
from kbitcheck.run.requirements import TRAINERS

LOOK_UP = "kbitcheck completion --words models 2>/dev/null"


@dataclass(frozen=True)
class Values:
    """What can stand in a place: words, the hub's models, files."""

    words: tuple[str, ...] = ()
    hub: bool = False
    files: bool = False


def _values(metavar: str, choices: tuple[str, ...]) -> Values | None:
    """The values behind a metavar; None where nothing can be proposed, such as for a number."""
    if choices:
        return Values(choices)
    name = metavar.strip("[].").removesuffix("...")
    kinds = {
        "MODEL": lambda: Values(tuple(f"tiny:{name}" for name in recipe.names()), hub=True, files=True),
        "IMPL": lambda: Values(("reference", "peft", *TRAINERS), files=True),
        "Q": lambda: Values(tuple(registry.schemes())),
        "CODES": lambda: Values(tuple(rules())),
        "CODE": lambda: Values(tuple(rules())),
        "CODE=REASON": lambda: Values(tuple(f"{code}=" for code in rules())),
        "SIZE|GPU": lambda: Values(
            tuple(gpu for names in GPUS.values() for gpu in names.split(", ") if " " not in gpu)
        ),
        "DEVICE": lambda: Values(("auto", "cpu", "cuda", "xpu", "mps")),
        "bash|zsh|fish": lambda: Values(("bash", "zsh", "fish")),
    }
    if name in kinds:
        return kinds[name]()
    return Values(files=True) if "FILE" in name or "json" in name or name in ("DIR", "-- COMMAND") else None


@dataclass(frozen=True)
class Command:
    """A command: its options with their values, and the values of its arguments."""

    name: str
    options: dict[str, Values | None]
    switches: tuple[str, ...]
    argument: Values | None


def commands() -> Iterator[Command]:
    """Every command."""
    for name in COMMANDS:
        options: dict[str, Values | None] = {}
        switches = ["--help", "--help-all"]
        argument: Values | None = None
        for each in fields(import_module(f"kbitcheck.cli.commands.{name}").Options):
            values = _values(each.metadata["metavar"], tuple(each.metadata.get("choices", ())))
            if "nargs" in each.metadata:
                argument = values
            elif each.default is False:
                switches += [f"--{each.name.replace('_', '-')}"]
            else:
                options[f"--{each.name.replace('_', '-')}"] = values
        yield Command(name, options, tuple(switches), argument)


def _cases(separator: str, look_up: str, files: str, nothing: str) -> Iterator[str]:
    """The arms of a case statement over the command and the word before."""

    def arm(pattern: str, values: Values | None) -> str:
        if values is None:
            return f"    {pattern}) {nothing} ;;"
        words = shlex.quote(" ".join(values.words))
        parts = [f"words={words}", *[look_up] * values.hub, *[files] * values.files]
        return f"    {pattern}) {separator.join(parts)} ;;"

    for command in commands():
        for name, values in command.options.items():
            yield arm(f"'{command.name} {name}'", values)
        offered = shlex.quote(" ".join([*command.options, *command.switches]))
        yield f"    '{command.name} '*) options={offered}; argument='{command.name}' ;;"
    yield "  esac"
    yield '  case "$argument" in'
    for command in commands():
        if command.argument is not None:
            yield arm(command.name, command.argument)


def bash() -> str:
    """The script for bash."""
    arms = "\n".join(_cases("; ", f'words+=" $({LOOK_UP})"', "files=1", "return"))
    return f"""\
# Completion of kbitcheck for bash; written by `kbitcheck completion bash`.
_kbitcheck() {{
  local line current words options argument files prefix
  line="${{COMP_LINE:0:COMP_POINT}}"
  current="${{line##* }}"
  COMPREPLY=()
  if [[ "$line" != *' '*' '* ]]; then
    COMPREPLY=($(compgen -W {shlex.quote(" ".join([*COMMANDS, "--help", "--version"]))} -- "$current"))
    return
  fi
  local -a typed=(${{line%"$current"}})
  case "${{typed[1]}} ${{typed[${{#typed[@]}}-1]}}" in
{arms}
  esac
  [[ "$current" == -* || -z "$words$files" ]] && words="$options"
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  [[ -n "$files" ]] && COMPREPLY+=($(compgen -f -- "$current"))
  if [[ "$current" == *:* && "$COMP_WORDBREAKS" == *:* ]]; then
    prefix="${{current%"${{current##*:}}"}}"
    COMPREPLY=("${{COMPREPLY[@]#"$prefix"}}")
  fi
}}
complete -o filenames -o nosort -F _kbitcheck kbitcheck
"""


def zsh() -> str:
    """The script for zsh."""
    arms = "\n".join(_cases("; ", f'words+=" $({LOOK_UP})"', "files=1", "return")).replace("words", "offer")
    return f"""\
#compdef kbitcheck
# Completion of kbitcheck for zsh; written by `kbitcheck completion zsh`.
_kbitcheck() {{
  local offer options argument files
  if (( CURRENT == 2 )); then
    compadd -- {" ".join([*COMMANDS, "--help", "--version"])}
    return
  fi
  case "${{words[2]}} ${{words[CURRENT-1]}}" in
{arms.replace(" --offer models", " --words models")}
  esac
  [[ "${{words[CURRENT]}}" == -* || -z "$offer$files" ]] && offer="$options"
  compadd -- ${{(z)offer}}
  if [[ -n "$files" ]]; then _files; fi
}}
if [[ "$funcstack[1]" == _kbitcheck ]]; then _kbitcheck "$@"; else compdef _kbitcheck kbitcheck; fi
"""


def fish() -> str:
    """The script for fish."""
    lines = ["# Completion of kbitcheck for fish; written by `kbitcheck completion fish`.", "complete -c kbitcheck -f"]
    for name, summary in COMMANDS.items():
        lines.append(f"complete -c kbitcheck -n __fish_use_subcommand -a {name} -d {_fish(summary)}")
    for command in commands():
        at = f"complete -c kbitcheck -n '__fish_seen_subcommand_from {command.name}'"
        for name, values in command.options.items():
            lines.append(f"{at} -l {name[2:]} -r {_fish_values(values)}".rstrip())
        lines += [f"{at} -l {name[2:]}" for name in command.switches]
        if command.argument is not None:
            lines.append(f"{at} {_fish_values(command.argument)}")
    return "\n".join(lines) + "\n"


def _fish_values(values: Values | None) -> str:
    if values is None:
        return "-f"
    words = " ".join([*values.words, *[f"({LOOK_UP})"] * values.hub])
    return " ".join(["-F" if values.files else "-f", *([f"-a {_fish(words)}"] if words else [])])


def _fish(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
