"""How long a run may still take, and when it is time to say so."""

import time

EVERY = 30.0  # seconds between two lines


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Pace:
    """The pace of a run over ``total`` steps (None: nobody knows how many), from its beginning on."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._start = self._said = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another line; then the next is due later."""
        if time.monotonic() - self._said < EVERY:
            return False
        self._said = time.monotonic()
        return True

    @property
    def so_far(self) -> str:
        """The time since the beginning."""
        return f"{duration(time.monotonic() - self._start)} so far"

    def left(self, done: int) -> str:
        """The time that is left if the rest goes on as the steps that are done; empty where none tells."""
        if not done or self._total is None:
            return ""
        return f"about {duration((time.monotonic() - self._start) * max(self._total - done, 0) / done)} left"
