"""A few architectures exist; ``late`` cannot be loaded."""


def listed(task: str) -> dict[str, str]:
    return {"llama": "Llama", "gpt2": "GPT2", "late": "Late", "opt": "Opt"} if task == "causal-lm" else {}
