"""A process that has imported what training takes, and forks the processes of compositions: ``python -m ... REQUESTS REPLIES``.

It has run no step when it forks, so that each of its children is as a fresh process, and costs no import.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kbitcheck.observe.composition.internals import end

ENDED = 5.0  # seconds that a process has to end by itself once another of the same composition is lost


def serve(requests: int, replies: int) -> None:
    """Answer each request, a line of JSON, with how each of its processes ended."""
    os.set_inheritable(requests, False)
    os.set_inheritable(replies, False)
    import torch

    from kbitcheck.observe.composition import process

    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # bitsandbytes compiles a kernel for each shape
    alive = os.pipe()  # its end is the end of this process
    with os.fdopen(requests, encoding="utf-8") as lines, os.fdopen(replies, "w", encoding="utf-8") as answers:
        for line in lines:
            job = json.loads(line)
            try:
                process.make_ready(job)
                ended: Any = _run(job, lines.fileno(), alive)
            except Exception as error:
                from kbitcheck.core.errors import cause

                ended = cause(error)
            answers.write(json.dumps(ended) + "\n")
            answers.flush()


def _run(job: Mapping[str, Any], requests: int, alive: tuple[int, int]) -> list[dict[str, Any]]:
    """Fork the processes of a job, at once or one after the other, and wait for them."""
    groups = [[rank] for rank in range(job["processes"])] if job["in_turn"] else [list(range(job["processes"]))]
    ended: list[dict[str, Any]] = []
    for group in groups:
        running = {_forked(job, rank, alive): rank for rank in group}
        ended += _waited(running, time.monotonic() + job["seconds"], requests)
        if any(one["code"] for one in ended):
            break
    return ended


def _forked(job: Mapping[str, Any], rank: int, alive: tuple[int, int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.close(alive[1])
        threading.Thread(target=_end_with, args=(alive[0],), daemon=True).start()
        log = os.open(str(Path(job["folder"], f"{rank}.log")), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        from kbitcheck.observe.composition import process

        code = process.run(job, rank)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        end(code)


def _end_with(parent: int) -> None:
    os.read(parent, 1)
    end(1)


def _waited(running: dict[int, int], deadline: float, requests: int) -> list[dict[str, Any]]:
    """How each process ended. One that is lost, or the deadline, ends the others."""
    ended: list[dict[str, Any]] = []
    lost = False
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if child in running:
            code = os.waitstatus_to_exitcode(status)
            ended.append({"rank": running.pop(child), "code": code, "late": False})
            if code and not lost:
                lost, deadline = True, min(deadline, now + ENDED)
            continue
        if now > deadline:
            for late in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(late, signal.SIGUSR1)  # prints where it is
            time.sleep(0.5)
            _kill(running)
            ended += [{"rank": rank, "code": -signal.SIGKILL, "late": True} for rank in running.values()]
            return ended
        if select.select([requests], [], [], 0.01)[0] and not os.read(requests, 1):
            _kill(running)
            end(1)
    return ended


def _kill(running: Sequence[int] | Mapping[int, int]) -> None:
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
