"""Reports of findings that nobody has reported upstream, in the form of each project's template for bugs.

``python docs/site/upstream.py`` writes ``docs/findings/NAME.md`` for each of them, to be pasted into a new issue there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from other_pages import SCRIPTS, Finding, committed_findings

VERSIONS = {
    "peft": "0.21.2",
    "transformers": "5.23.0",
    "bitsandbytes": "0.50.2",
    "torch": "2.13.0+cpu",
    "Python": "3.11",
}
VERSION = "\n".join(f"- {name} {version}" for name, version in VERSIONS.items())
INFORMATION = "- [ ] The official example scripts\n- [x] My own modified scripts"
TASKS = "- [ ] An officially supported task in the `examples` folder (such as GLUE/SQuAD, ...)\n- [x] My own task or dataset"
NEW = {
    "peft": "https://github.com/huggingface/peft/issues/new?template=bug-report.yml",
    "transformers": "https://github.com/huggingface/transformers/issues/new?template=bug-report.yml",
    "bitsandbytes": "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/new?template=bug-report.yml",
    "pytorch": "https://github.com/pytorch/pytorch/issues/new?template=bug-report.yml",
    "torchao": "https://github.com/pytorch/ao/issues/new",
    "optimum-quanto": "https://github.com/huggingface/optimum-quanto/issues/new",
    "compressed-tensors": "https://github.com/vllm-project/compressed-tensors/issues/new",
    "hqq": "https://github.com/mobiusml/hqq/issues/new",
    "GPTQModel": "https://github.com/ModelCloud/GPTQModel/issues/new",
}


def report(finding: Finding) -> str:
    """A finding's report as Markdown: a title, where to file it, and the template's fields.

    Raises:
        KeyError: the finding has no text for a report, or names a project without a template here.
    """
    text = finding.report
    reproduction = f"{text['found']}\n\n```python\n{_script(finding)}\n```\n\nIt exits 0 while the defect is there, and 1 once it is gone."
    remedy = f"**Cause.** {text['cause']}\n\n**A fix.** {text['fix']}"
    expected = f"{text['expected']}\n\n{remedy}"
    plain = {"System Info": VERSION, "Reproduction": reproduction, "Expected behavior": expected}
    fields: Mapping[str, Mapping[str, str]] = {
        "peft": {
            "System Info": VERSION,
            "Who can help?": "",
            "Reproduction": reproduction,
            "Expected behavior": expected,
        },
        "transformers": {
            "System Info": VERSION,
            "Who can help?": "",
            "Information": INFORMATION,
            "Tasks": TASKS,
            "Reproduction": reproduction,
            "Expected behavior": expected,
        },
        "bitsandbytes": plain,
        "optimum-quanto": plain,
        "hqq": plain,
        "GPTQModel": plain,
        "compressed-tensors": plain,
        "torchao": plain,
        "pytorch": {
            "🐛 Describe the bug": f"{reproduction}\n\n**Expected.** {expected}",
            "Versions": VERSION,
        },
    }
    sections = (f"### {name}\n\n{content or '_No response_'}" for name, content in fields[text["project"]].items())
    head = f"# {finding.title}\n\nTo be filed at <{NEW[text['project']]}>; what follows fills its fields."
    return "\n\n".join([head, *sections]) + "\n"


def reports() -> dict[Path, str]:
    """By file, the report of each finding that has none upstream."""
    return {SCRIPTS / f"{f.script}.md": report(f) for f in committed_findings() if f.report}


def _script(finding: Finding) -> str:
    return (SCRIPTS / f"{finding.script}.py").read_text(encoding="utf-8").rstrip()


if __name__ == "__main__":
    for path, content in reports().items():
        path.write_text(content, encoding="utf-8")
