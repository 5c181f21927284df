"""The rules as Markdown pages, from the registry and the sources of the sabotage; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from kbitcheck.core.rule import Rule, rules
from kbitcheck.report.parts.markup import table
from kbitcheck.report.rule_page import COMMANDS, FAILS, FAMILIES, SOURCES, RulePage, first_sentence, rule_page

# Where a source such as peft#2880 is to be read. What is not here stays text.
OWNERS = {
    "accelerate": "huggingface",
    "ai-toolkit": "ostris",
    "alpaca-lora": "tloen",
    "AutoAWQ": "casper-hansen",
    "axolotl": "axolotl-ai-cloud",
    "bitsandbytes": "bitsandbytes-foundation",
    "compressed-tensors": "vllm-project",
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


def pages() -> Iterator[tuple[str, str]]:
    """Path and text of the index and of each rule's page.

    Raises:
        LookupError: there is no fault that a rule must catch.
    """
    yield "rules/index.md", index(rules())
    for code, rule in rules().items():
        contents = rule_page(rule)
        if not contents.examples:
            raise LookupError(f"{code} has no fault that it must catch")
        yield f"rules/{code}.md", page(contents)


def index(registered: Mapping[str, Rule]) -> str:
    """The rules by family."""
    out = [
        "# Rules\n",
        (
            f"{len(registered)} rules in {len({r.family for r in registered.values()})} families. "
            "**MUST**: breaking it is non-conformance. **SHOULD**: reported, and counted under `--strict`. "
            "**INFO**: a fact worth reading. Codes are forever: none is reused or renumbered. "
            "`kbitcheck rules` lists them in a terminal, `kbitcheck rules KB303` shows the page of one.\n"
        ),
    ]
    families: dict[str, list[Rule]] = {}
    for rule in registered.values():
        families.setdefault(FAMILIES.get(rule.family, rule.family), []).append(rule)
    for family, members in families.items():
        rows = [
            (f"[{r.code}]({r.code}.md) {r.name}", r.level.value, prose(first_sentence(r.requirement))) for r in members
        ]
        out += [f"\n## {family}\n", *table(("rule", "level", "requirement"), rows)]
    return "\n".join(out) + "\n"


def page(contents: RulePage) -> str:
    """The page of a rule as Markdown, in the order of ``kbitcheck rules CODE``."""
    out = [f"# {contents.title}\n", f"**{contents.level}** · {contents.family}\n", f"> {prose(contents.requirement)}\n"]
    out += [f"{prose(text)}\n" for text in contents.details]
    out += [f"## {heading}\n\n{prose(text)}\n" for heading, text in contents.explanations]
    out += [f"## {FAILS}\n\n{contents.catches}\n"]
    out += [f"{e.title} (`{e.case}`):\n\n```python\n{e.source}\n```\n" for e in contents.examples]
    if contents.sources:
        out.append(f"## {SOURCES}\n\n{linked(contents.sources)}\n")
    commands = "\n".join(f"$ {command}" for command in contents.commands)
    out.append(f"## {COMMANDS}\n\n```console\n{commands}\n```\n")
    return "\n".join(out)


def prose(text: str) -> str:
    """Text with code between backticks as Markdown; what is no code holds no markup."""
    spans = re.split(r"`+([^`]+)`+", text)
    spans[::2] = [re.sub(r"([\\*_<>\[\]])", r"\\\1", span) for span in spans[::2]]
    spans[1::2] = [f"`{span}`" for span in spans[1::2]]
    return "".join(spans)


def linked(text: str) -> str:
    """Issues and findings become links."""

    def issue(match: re.Match[str]) -> str:
        owner = OWNERS.get(match[1])
        return f"[{match[0]}](https://github.com/{owner}/{match[1]}/issues/{match[2]})" if owner else match[0]

    text = re.sub(r"([A-Za-z][\w.-]*)#(\d+)", issue, prose(text).replace("\\_", "_"))
    return re.sub(r"docs/findings/(\w+)\.py", lambda f: f"[{f[1]}](../findings.md#{f[1]})", text)
