"""Sizes as people read them."""

BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def size(number: float) -> str:
    """Three figures and a binary prefix, as memory is sold and as torch reports it."""
    for unit in BINARY[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} {BINARY[-1]}"


def scaled(number: float, units: tuple[str, ...]) -> str:
    """Three figures and one of the units, each a thousand times the one before."""
    for unit in units[:-1]:
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}"
