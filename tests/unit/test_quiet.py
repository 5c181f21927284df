"""In the process of a caller, a library's line is shown once, however often it is logged; rules hear each."""

import logging

from kbitcheck.observe.probes.call import _logged
from kbitcheck.run.in_process import like_a_worker


def test_what_is_logged_again_is_not_shown_again(caplog):
    log = logging.getLogger("a library")
    with like_a_worker(), _logged() as heard:
        for dtype in ("float32", "bfloat16", "float32"):
            log.warning("inputs will be cast from %s", dtype)
        log.warning("something else")
    log.warning("inputs will be cast from %s", "float32")
    assert [record.getMessage() for record in caplog.records] == [
        "inputs will be cast from float32",
        "something else",
        "inputs will be cast from float32",
    ]
    assert len(heard) == 4
