"""What ranks do in the tests of their ends; other processes import this."""

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kbitcheck.sabotage import composition


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


def killed(run: Any) -> None:
    """The whole run is begun by a process that is killed behind its save, between two passes; what that saved is resumed."""
    if run.rank:
        return
    own, saves = run.go, Path(run.folder)

    def go() -> None:
        child = os.fork()
        if not child:
            _die_behind_a_save(run, saves)
            own()
            os._exit(0)  # was not killed
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        with tempfile.TemporaryDirectory() as kept:
            of_the_killed = [path for path in saves.iterdir() if _is_save(path)]
            assert of_the_killed
            for path in of_the_killed:
                shutil.move(path, kept)
            own()
            for path in of_the_killed:
                _remove(path)
                shutil.move(Path(kept, path.name), path)

    run.go = go


def _is_save(path: Path) -> bool:
    return path.name == "saved.pt" or path.name.startswith("checkpoint-")


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _die_behind_a_save(run: Any, saves: Path) -> None:
    """Kill this process where it begins the next pass."""

    def begins(model: Any, args: Any) -> None:
        if model.training and any(map(_is_save, saves.iterdir())):
            os.kill(os.getpid(), signal.SIGKILL)

    attached = run.attached

    def with_hook() -> Any:
        model, adapters = attached()
        model.register_forward_pre_hook(begins)
        return model, adapters

    run.attached = with_hook


def killed_without_the_optimizer(run: Any) -> None:
    killed(run)
    composition.resumed_without_the_optimizers_state(run)


def killed_without_the_scheduler(run: Any) -> None:
    killed(run)
    composition.resumed_without_the_scheduler(run)


def killed_without_random_states(run: Any) -> None:
    killed(run)
    composition.resumed_without_random_states(run)


def killed_trainer_without_the_optimizer(run: Any) -> None:
    killed(run)
    composition.a_checkpoint_without_the_optimizer(run)


def killed_trainer_without_random_states(run: Any) -> None:
    killed(run)
    composition.a_checkpoint_without_random_states(run)
