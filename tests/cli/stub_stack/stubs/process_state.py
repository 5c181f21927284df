"""A stub of ``kbitcheck.observe.probes.process_state``: nothing is read of the process, so that nothing changes."""

OF_IMPORTS: frozenset[str] = frozenset()


def state() -> dict[str, str]:
    return {}


def changed(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {}
