"""Whatever a program changes in its process is seen under its own name, and nothing else is."""

import atexit
import copyreg
import gc
import importlib
import io
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from importlib.machinery import PathFinder

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch.optim.optimizer import register_optimizer_step_post_hook

from kbitcheck.observe.probes import runtime_settings
from kbitcheck.observe.probes.process_state import OF_IMPORTS, THREADS, Before, changed, effects, state
from kbitcheck.run import subject


@contextmanager
def thread():
    stop = threading.Event()
    started = threading.Thread(target=stop.wait, name="left behind")
    started.start()
    yield
    stop.set()
    started.join()


@contextmanager
def timer():
    started = threading.Timer(60, print)
    started.start()
    yield
    started.cancel()
    started.join()


@contextmanager
def handler():
    before = signal.signal(signal.SIGUSR2, lambda *args: None)
    yield
    signal.signal(signal.SIGUSR2, before)


@contextmanager
def callback_at_exit():
    atexit.register(time.time)
    yield
    atexit.unregister(time.time)


@contextmanager
def optimizer_hook():
    handle = register_optimizer_step_post_hook(lambda *args: None)
    yield
    handle.remove()


@contextmanager
def garbage_callback():
    gc.callbacks.append(print)
    yield
    gc.callbacks.remove(print)


@contextmanager
def profiler():
    sys.setprofile(lambda *args: None)
    yield
    sys.setprofile(None)


@contextmanager
def finder():
    sys.meta_path.append(PathFinder)
    yield
    sys.meta_path.pop()


def attribute(owner, name, value):
    @contextmanager
    def replaced():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, value)
            yield

    return replaced


@contextmanager
def variable():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEFT_BEHIND", "1")
        yield


@contextmanager
def undone(act, undo):
    act()
    yield
    undo()


LOGGER = logging.getLogger("there")


def level_of_a_logger():
    return undone(partial(LOGGER.setLevel, logging.ERROR), partial(LOGGER.setLevel, logging.NOTSET))


def printing():
    return undone(partial(torch.set_printoptions, precision=2), partial(torch.set_printoptions, precision=4))


def rights_of_files():
    before = os.umask(0o022)
    os.umask(before)
    return undone(partial(os.umask, before ^ 0o050), partial(os.umask, before))


def fewer_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE)
    return undone(partial(limit, (soft - 1, hard)), partial(limit, (soft, hard)))


def switch_interval():
    return undone(partial(sys.setswitchinterval, 0.5), partial(sys.setswitchinterval, sys.getswitchinterval()))


def saved_tensor_hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def sharing_strategy():
    strategy = torch.multiprocessing.set_sharing_strategy
    return undone(partial(strategy, "file_system"), partial(strategy, torch.multiprocessing.get_sharing_strategy()))


def sum_in_half_precision():
    matmul, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before = getattr(matmul, name)
    return undone(partial(setattr, matmul, name, not before), partial(setattr, matmul, name, before))


def compiler():
    config = importlib.import_module("torch._dynamo.config")
    runtime_settings._compiler_modules.cache_clear()
    return config.patch(suppress_errors=not config.suppress_errors)


def numbers():
    before = locale.setlocale(locale.LC_NUMERIC)
    other = "C.UTF-8" if before == "C" else "C"
    return undone(
        partial(locale.setlocale, locale.LC_NUMERIC, other), partial(locale.setlocale, locale.LC_NUMERIC, before)
    )


def pickled():
    return undone(partial(copyreg.pickle, Fraction, str), partial(copyreg.dispatch_table.pop, Fraction, None))


LEFT_BEHIND = {
    "printing": printing,
    "limits and rights": rights_of_files,
    "interpreter": switch_interval,
    "modes of torch": saved_tensor_hooks,
    "defaults of torch's checkpoint": partial(torch.utils.checkpoint.set_checkpoint_early_stop, False),
    "processes": sharing_strategy,
    "reduced precision": sum_in_half_precision,
    "compiler": compiler,
    "locale": numbers,
    "standard streams": attribute(sys, "stdout", io.StringIO()),
    "sockets": lambda: undone(partial(socket.setdefaulttimeout, 9), partial(socket.setdefaulttimeout, None)),
    "pickling": pickled,
    "threads": thread,
    "signal handlers": handler,
    "atexit callbacks": callback_at_exit,
    "hooks on every optimizer": optimizer_hook,
    "garbage collection's callbacks": garbage_callback,
    "tracing": profiler,
    "exception hooks": attribute(sys, "excepthook", print),
    "import hooks": finder,
    "environment variables": variable,
    "float32 precision": attribute(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
}


def test_limits_of_the_process_are_seen():
    before = state()
    with fewer_open_files():
        after = state()
    assert [*changed(before, after)] == ["limits and rights"]


def warnings_ignored():
    return warnings.catch_warnings(action="ignore")


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (level_of_a_logger, "logger there"),
        (attribute(warnings, "showwarning", print), "warnings.showwarning"),
        (attribute(logging.Logger, "warning", print), "logging.Logger.warning"),
        (attribute(torch.Tensor, "item", lambda self: 0), "torch.Tensor.item"),
        (attribute(torch.optim.Optimizer, "add_param_group", print), "torch.optim.optimizer.Optimizer.add_param_group"),
        (warnings_ignored, "warnings shown"),
    ],
)
def test_a_lasting_effect_is_one_even_where_an_import_changes_its_like(act, name):
    before = Before(torch.nn.Linear(1, 1))
    assert before.lasting() == {}
    with act():
        logging.getLogger("a logger that is new")
        assert [*before.lasting()] == [name]


@pytest.mark.parametrize("setting", LEFT_BEHIND)
def test_what_is_left_behind_is_seen_under_its_name(setting):
    before = state()
    with LEFT_BEHIND[setting]():
        after = state()
    assert [*changed(before, after)] == [setting]


def test_a_timer_is_a_thread():
    before = state()
    with timer():
        assert [*changed(before, state())] == ["threads"]


def test_the_monitor_of_a_progress_bar_is_nobodys_thread():
    before = state()
    with pytest.importorskip("tqdm").tqdm(total=1) as bar:
        assert bar.monitor is not None
        assert state() == before


@pytest.mark.parametrize(
    ("owner", "name"), [(torch, "clamp"), (torch.nn.functional, "linear"), (numpy, "dot"), (time, "time")]
)
def test_a_function_that_is_patched_meanwhile_is_an_effect(owner, name, monkeypatch):
    with effects(torch.nn.Linear(1, 1)) as happened:
        monkeypatch.setattr(owner, name, print)
    assert happened == {f"{owner.__name__}.{name}": ("original", "replaced by builtins.print")}


def test_a_patched_method_of_the_models_class_is_an_effect(monkeypatch):
    with effects(torch.nn.Linear(1, 1)) as happened:
        monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x)
    assert [*happened] == ["torch.nn.modules.linear.Linear.forward"]


def test_drawing_from_torch_is_none_and_from_python_is():
    with effects(torch.nn.Linear(1, 1)) as happened:
        torch.rand(1)
    assert happened == {}
    before = random.getstate()
    with effects(torch.nn.Linear(1, 1)) as happened:
        random.random()
    random.setstate(before)
    assert [*happened] == ["random RNG"]


@pytest.mark.parametrize(
    ("code", "setting"),
    [
        ("import os\nos.environ['LEFT_BEHIND'] = '1'", "environment variables"),
        ("import torch\ntorch.set_flush_denormal(True)", "denormals flushed"),
        ("import torch\ntorch.nn.Linear.forward = torch.nn.Linear.forward.__get__", "torch.nn.modules.linear.Linear.forward"),
        ("import warnings\nwarnings.simplefilter('ignore')", None),
    ],
)  # fmt: skip
def test_what_an_import_leaves_is_told_with_the_implementation(code, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", torch.nn.Linear.forward)
    monkeypatch.setenv("LEFT_BEHIND", "")
    file = tmp_path / "prep.py"
    file.write_text(f"{code}\n\n\ndef prepare(model):\n    return model\n")
    try:
        imported = subject.load(f"{file}:prepare").imported
    finally:
        torch.set_flush_denormal(False)
    assert [*imported] == ([setting] if setting else [])


def test_what_imports_may_change_are_settings():
    assert state().keys() >= OF_IMPORTS
    assert "LEFT_BEHIND" not in os.environ


def test_the_threads_that_kbitcheck_sets_itself_are_no_lasting_effect():
    before, threads = Before(torch.nn.Linear(1, 1)), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert THREADS in before.changed()
        assert THREADS not in before.lasting()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_is_printed_meanwhile_is_an_effect_and_still_printed(stream, capsys):
    with effects(torch.nn.Linear(1, 1)) as happened:
        print("a step\n", file=getattr(sys, stream))
    assert happened == {"printed": ("nothing", "a step")}
    assert "a step" in getattr(capsys.readouterr(), stream[3:])


def test_warnings_logs_and_progress_bars_are_no_prints(capsys):
    tqdm = pytest.importorskip("tqdm").tqdm
    logger = logging.Logger("of this test alone")
    before = sys.stdout, sys.stderr
    with effects(torch.nn.Linear(1, 1)) as happened:
        logger.addHandler(logging.StreamHandler())
        logger.warning("a log")
        exec(
            "import sys\nprint('a warning', file=sys.stderr)", {"__name__": "warnings"}
        )  # pytest has replaced its functions
        [*tqdm(range(2), desc="a bar")]
    assert happened == {}
    assert (sys.stdout, sys.stderr) == before
    told = capsys.readouterr().err
    assert [text in told for text in ("a log", "a warning", "a bar")] == [True] * 3
