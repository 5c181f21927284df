"""One model exists."""

from kbitcheck.core.errors import UsageError

__path__: list[str] = []


def resolve(model: str, **options: object) -> object:
    if model not in ("tiny:llama", "tiny:gpt2", "tiny:t5", "late"):
        raise UsageError(f"no such model: {model!r}")
    return object()


class recipe:
    PREFIX = "tiny:"

    @staticmethod
    def names() -> list[str]:
        return ["gpt2", "llama", "t5"]
