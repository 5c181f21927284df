"""What ``--help`` shows first, in which group an option stands, and what ``--help-all`` alone shows."""

from collections.abc import Iterable, Iterator

FIRST = "Used first"
# By title: options that `--help` shows, and options that `--help-all` shows as well. An option of no group is of the latter.
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "What is judged": (
        ("model", "quant", "checkpointing", "profile", "select", "ignore", "strict", "suite"),
        ("adapters", "targets", "rank", "freezes", "batch", "seq_len", "seed", "cut", "conditions", "composition"),
    ),
    "What is forecast": (
        (),
        ("autocast", "attention", "packed", "loss", "image_size", "optimizer", "accumulate", "gpus"),
    ),
    "How it runs": (("device", "timeout", "jobs", "plan"), ("fuzz", "hours", "in_process")),
    "What comes out": (("format", "output", "quiet", "verbose", "color"), ("debug",)),
}
OTHERS = "More"
USED_FIRST = {
    "model": ("quant", "prepare", "static", "memory", "fits"),
    "impl": ("model", "quant", "fuzz"),
    "gate": ("ledger", "accept", "against"),
    "matrix": ("model", "quant"),
    "watch": ("steps", "trains"),
    "adapter": ("base", "quant"),
    "sweep": ("task", "select", "quant", "jobs"),
}
FEW = 14  # options, which need no groups


def grouped(command: str, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Each option in the order of the help, with the title of its group and whether ``--help`` shows it."""
    names = [*names]
    if len(names) <= FEW:
        yield from ((name, "Options", True) for name in names)
        return
    left = dict.fromkeys(names)
    titles = {FIRST: (USED_FIRST.get(command, ()), ()), **GROUPS}
    for title, (common, more) in titles.items():
        for name in (*common, *more):
            if name in left:
                del left[name]
                yield name, title, name in common
    yield from ((name, OTHERS, False) for name in left)


EXAMPLES: dict[str, tuple[str, ...]] = {
    "model": (
        "kbitcheck model tiny:llama --quant nf4 --quant int8",
        "kbitcheck model tiny:mixtral --static --memory 24GiB",
        "kbitcheck model tiny:gpt2 --prepare mypkg.prepare:prepare --format html --output report.html",
    ),
    "impl": (
        "kbitcheck impl mypkg.prepare:prepare",
        "kbitcheck impl mypkg/prepare.py:prepare --model tiny:llama --quant nf4 --select KB3",
        "kbitcheck impl reference --ignore KB505='the hooks are ours'",
    ),
    "gate": (
        "kbitcheck gate mypkg.prepare:prepare --ledger kbitcheck-ledger.toml --accept",
        "kbitcheck gate mypkg.prepare:prepare --ledger kbitcheck-ledger.toml",
        "kbitcheck gate mypkg.prepare:prepare --against reference",
    ),
    "matrix": ("kbitcheck matrix reference mypkg.prepare:prepare --format markdown",),
    "watch": ("kbitcheck watch -- python train.py --lr 2e-4", "kbitcheck watch --trains v_head -- torchrun train.py"),
    "adapter": ("kbitcheck adapter out/", "kbitcheck adapter out/ --base tiny:llama"),
    "diff": ("kbitcheck diff before.json after.json",),
    "backends": ("kbitcheck backends --format markdown",),
    "config": ("kbitcheck config", "kbitcheck config ledger", "kbitcheck config --schema"),
    "env": ("kbitcheck env", "kbitcheck env --format json"),
    "init": ("kbitcheck init", "kbitcheck init mypkg.prepare:prepare --no-ledger"),
    "completion": (
        "kbitcheck completion bash > ~/.local/share/bash-completion/completions/kbitcheck",
        "kbitcheck completion zsh > ~/.zfunc/_kbitcheck",
        "kbitcheck completion fish > ~/.config/fish/completions/kbitcheck.fish",
    ),
    "rules": ("kbitcheck rules", "kbitcheck rules KB1", "kbitcheck rules KB101"),
    "selftest": ("kbitcheck selftest", "kbitcheck selftest --select KB101"),
    "sweep": ("kbitcheck sweep --select 'llama*' --quant nf4 --output sweep.txt",),
    "badge": ("kbitcheck badge report.json --output badge.json",),
    "show": ("kbitcheck show report.json", "kbitcheck show report.json --format html --output report.html"),
}


def examples(command: str) -> str:
    """The examples of a command, below its options."""
    return "\n".join(["Examples:", *(f"  {line}" for line in EXAMPLES[command])])
