"""The rules as Markdown pages, from the registry and the sources of the sabotage; imports no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path

import kbitcheck
from kbitcheck.core.rule import Rule, rules
from kbitcheck.report.html import FAMILIES

SABOTAGE = Path(kbitcheck.__file__).parent / "sabotage"
HOWS = {
    "breaks": "Done to a model that the reference prepared",
    "wraps": "Done to the reference, which then prepares",
    "implements": "An implementation of its own",
    "adds": "Done by an implementation of its own, besides freezing, casting and switching on",
    "spoils": "Done to the model before it is looked at",
}
# Where a source such as peft#2880 is to be read. What is not here stays text.
OWNERS = {
    "accelerate": "huggingface",
    "ai-toolkit": "ostris",
    "alpaca-lora": "tloen",
    "AutoAWQ": "casper-hansen",
    "axolotl": "axolotl-ai-cloud",
    "bitsandbytes": "bitsandbytes-foundation",
    "diffusers": "huggingface",
    "GPTQModel": "ModelCloud",
    "LLaMA-Factory": "hiyouga",
    "llm-foundry": "mosaicml",
    "MiniGPT-4": "Vision-CAIR",
    "ms-swift": "modelscope",
    "peft": "huggingface",
    "qlora": "artidoro",
    "transformers": "huggingface",
    "trl": "huggingface",
    "unsloth": "unslothai",
    "unsloth-zoo": "unslothai",
}


@dataclass(frozen=True, slots=True)
class Example:
    """A sabotage: what its rule must catch, on which case, as source text with what it needs of its module."""

    name: str
    how: str
    case: Mapping[str, str]
    source: str


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of the index and of each rule's page.

    Raises:
        LookupError: a rule has no sabotage.
    """
    known, shown = rules(), examples()
    yield "rules/index.md", index(known)
    for code, rule in known.items():
        if code not in shown:
            raise LookupError(f"{code} has no sabotage in {SABOTAGE}")
        yield f"rules/{code}.md", page(rule, shown[code])


def index(known: Mapping[str, Rule]) -> str:
    """The rules by family."""
    out = [
        "# Rules\n",
        (
            f"{len(known)} rules in {len({r.family for r in known.values()})} families. "
            "**MUST**: breaking it is non-conformance. **SHOULD**: told, and counted under `--strict`. "
            "**INFO**: a fact worth knowing. Codes are forever: none is reused or renumbered. "
            "`kbitcheck rules` lists them in a terminal, `kbitcheck rules KB303` explains one.\n"
        ),
    ]
    family = ""
    for code, rule in known.items():
        if rule.family != family:
            family = rule.family
            out += [f"\n## {FAMILIES.get(family, family)}\n", "| rule | level | requirement |", "|---|---|---|"]
        first = rule.requirement.split(". ")[0].removesuffix(".")
        out.append(f"| [{code}]({code}.md) {rule.name} | {rule.level.value} | {prose(first, cell=True)} |")
    return "\n".join(out) + "\n"


def page(rule: Rule, shown: list[Example]) -> str:
    """What, why, what one sees, what to do, the failing example, where it comes from."""
    requirement, *explained = paragraphs(rule)
    out = [f"# {rule.code} {rule.name}\n", f"**{rule.level.value}** · {FAMILIES.get(rule.family, rule.family)}\n"]
    out += [f"> {prose(requirement)}\n", *(f"{prose(text)}\n" for text in explained)]
    for heading, title in (("Why", "Why"), ("Symptom", "You will see"), ("Fix", "What to do")):
        if text := rule.section(heading):
            out += [f"## {title}\n", f"{sentence(prose(text))}\n"]
    out += ["## What fails\n", f"`kbitcheck selftest --select {rule.code}` shows that the rule catches:\n"]
    for example in shown:
        case = ", ".join(example.case.values())
        out += [f"{HOWS[example.how]} (`{case}`):\n", f"```python\n{example.source}\n```\n"]
    if text := rule.section("Sources"):
        out += ["## Sources\n", f"{linked(sentence(text))}\n"]
    out += [
        "## Run it\n",
        (
            f"```console\n$ kbitcheck impl mypkg:prepare --select {rule.code}\n"
            f"$ pytest --kbit-impl mypkg:prepare --kbit-select {rule.code}\n```\n"
        ),
    ]
    return "\n".join(out)


def paragraphs(rule: Rule) -> list[str]:
    """The requirement, and what stands between it and the first heading."""
    text = re.split(r"^(?:Why|Symptom|Fix|Sources):", getdoc(rule.check) or "", maxsplit=1, flags=re.MULTILINE)[0]
    return [" ".join(part.split()) for part in text.strip().split("\n\n")]


def sentence(text: str) -> str:
    """With a capital, and a full stop, where a word begins and ends it."""
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+[ ,;]", text) else text
    return text if text.endswith((".", "?", "!")) else f"{text}."


def prose(text: str, *, cell: bool = False) -> str:
    """Docstring markup as Markdown; what is no code holds no markup."""
    spans = re.split(r"`+([^`]+)`+", text)
    spans[::2] = [re.sub(r"([\\*_<>\[\]])", r"\\\1", span) for span in spans[::2]]
    spans[1::2] = [f"`{span}`" for span in spans[1::2]]
    return "".join(spans).replace("|", "\\|") if cell else "".join(spans)


def linked(text: str) -> str:
    """Issues and findings become links."""

    def issue(found: re.Match[str]) -> str:
        owner = OWNERS.get(found[1])
        return f"[{found[0]}](https://github.com/{owner}/{found[1]}/issues/{found[2]})" if owner else found[0]

    text = re.sub(r"([A-Za-z][\w.-]*)#(\d+)", issue, prose(text).replace("\\_", "_"))
    return re.sub(r"docs/findings/(\w+)\.py", lambda f: f"[{f[1]}](../findings.md#{f[1]})", text)


def examples() -> dict[str, list[Example]]:
    """Every sabotage by the code of its rule."""
    found: dict[str, list[Example]] = {}
    for path in sorted(SABOTAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        for node in tree.body:
            for how, code, case in _registered(node):
                example = Example(node.name, how, case, _source(node, tree, text))  # type: ignore[attr-defined]
                found.setdefault(code, []).append(example)
    return dict(sorted(found.items()))


def _registered(node: ast.stmt) -> Iterator[tuple[str, str, dict[str, str]]]:
    for call in getattr(node, "decorator_list", ()):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in HOWS:
            given = {k.arg: k.value.value for k in call.keywords if k.arg and isinstance(k.value, ast.Constant)}
            case = {"model": "tiny:gpt2", "quant": "nf4", "checkpointing": "reentrant"}
            case |= {name: given[name] for name in case if name in given}
            yield call.func.id, ast.literal_eval(call.args[0]), case


def _source(node: ast.stmt, tree: ast.Module, text: str) -> str:
    """The function, after the private helpers of its module that it uses."""
    helpers = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n is not node}
    lines = text.splitlines()
    wanted: dict[str, ast.stmt] = {}

    def visit(at: ast.stmt) -> None:
        for name in (n.id for n in ast.walk(at) if isinstance(n, ast.Name)):
            if name in helpers and name not in wanted and not _is_fault(helpers[name]):
                wanted[name] = helpers[name]
                visit(helpers[name])

    visit(node)
    parts = [*sorted(wanted.values(), key=lambda n: n.lineno), node]
    return "\n\n\n".join("\n".join(lines[_first(n) - 1 : n.end_lineno]) for n in parts)


def _is_fault(node: ast.stmt) -> bool:
    return any(_registered(node))


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
