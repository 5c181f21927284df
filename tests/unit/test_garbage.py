"""Garbage collections: what is young goes, what is old or frozen is not walked."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap


class Ring:
    """A cycle, which only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


def run(code: str) -> str:
    """What a fresh interpreter prints, in which nothing is frozen yet."""
    imports = "import gc, weakref\nfrom kbitcheck.observe import garbage\nfrom tests.unit.test_garbage import Ring\n"
    done = subprocess.run(
        [sys.executable, "-c", imports + textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_young_cycle_is_collected_though_python_collects_none_by_itself() -> None:
    made = run("""
        with garbage.collecting_on_request():
            ring = weakref.ref(Ring())
            held = ring() is not None
            garbage.collect_young()
            print(held, ring() is None, gc.isenabled())
        print(gc.isenabled())
    """)
    assert made.split() == ["True", "True", "False", "True"]


def test_old_objects_are_frozen_within_the_context_alone() -> None:
    made = run("""
        with garbage.only_new_garbage():
            print(gc.get_freeze_count() > 0)
        print(gc.get_freeze_count())
    """)
    assert made.split() == ["True", "0"]


def test_what_a_process_keeps_stays_frozen() -> None:
    made = run("""
        garbage.keep_imports()
        kept = gc.get_freeze_count()
        with garbage.only_new_garbage():
            pass
        print(kept > 0, gc.get_freeze_count() == kept)
    """)
    assert made.split() == ["True", "True"]


def test_what_a_caller_froze_stays_frozen() -> None:
    made = run("""
        gc.freeze()
        with garbage.only_new_garbage():
            pass
        print(gc.get_freeze_count() > 0)
    """)
    assert made == "True"


def test_a_process_that_collects_by_itself_goes_on_to() -> None:
    from kbitcheck.observe import garbage

    assert gc.isenabled()
    with garbage.collecting_on_request():
        assert not gc.isenabled()
    assert gc.isenabled()
