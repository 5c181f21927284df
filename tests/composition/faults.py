"""What ranks do in the tests of their ends; other processes import this."""

import os
import sys
import time
from typing import Any


def rank_1_dies(run: Any) -> None:
    """Ends without a word to rank 0, which waits for it."""

    def data() -> Any:
        if run.rank == 1:
            print("the last line of rank 1", file=sys.stderr, flush=True)
            os._exit(7)
        return run.row(0)

    run.data = data


def rank_1_hangs(run: Any) -> None:
    """Takes no step."""

    def data() -> Any:
        if run.rank == 1:
            print("waiting", flush=True)
            time.sleep(600)
        return run.row(0)

    run.data = data
