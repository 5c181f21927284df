"""``kbitcheck.watch``: a broken run is named within three steps, a sound one is not, and no bit of any run changes."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
import transformers

import kbitcheck
from kbitcheck.core.result import Level, Status
from kbitcheck.observe.watch import batches, blocks, comparisons, reach
from kbitcheck.observe.watch.enabling import arguments
from tests.watch import runs


def train(run, *, steps=None, **options):
    """The losses and the model of a run, watched for ``steps``; None: not watched."""
    torch.manual_seed(5)
    model, optimizer, loop = run()
    first = loop.pop("first", lambda: None)
    torch.manual_seed(6)
    if steps is None:
        first()
        return runs.loop(model, optimizer, **loop), model, None
    with kbitcheck.watch(model, optimizer, steps=steps, **options) as watched:
        first()
        losses = runs.loop(model, optimizer, **loop)
    return losses, model, watched


def broken(report):
    return {r.rule for r in report if r.status is Status.FAIL and r.level is not Level.INFO}


@pytest.mark.parametrize("run", runs.SOUND, ids=lambda run: run.__name__)
def test_a_sound_run_conforms(run):
    _, _, watched = train(run, steps=3)
    assert broken(watched.report) <= {"KB907"}
    assert watched.report.exit_code == 0
    judged = {r.rule for r in watched.report if r.status is Status.PASS}
    assert judged >= {"KB104", "KB304", "KB710", "KB711", "KB712", "KB713", "KB714", "KB715"}


@pytest.mark.parametrize(("run", "code"), runs.BROKEN.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_run_is_named(run, code):
    _, _, watched = train(run, steps=3)
    assert code in broken(watched.report)


def test_float32_that_enters_quantized_layers_is_a_note_of_a_recipe_that_upcasts():
    _, _, watched = train(runs.plain, steps=1, select=["KB706"])
    (result,) = watched.report
    assert (result.status, result.notes) == (
        Status.PASS,
        ("float32 enters 14 quantized layers, as the recipe has it", "attention: sdpa"),
    )


def random_states():
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("run", [runs.dropout, runs.accumulated, runs.int8], ids=lambda run: run.__name__)
def test_no_bit_of_a_run_changes(run):
    losses, model, _ = train(run)
    after = random_states()
    watched_losses, watched_model, watched = train(run, steps=2)
    assert watched.report.exit_code == 0
    assert [a.equal(b) for a, b in zip(losses, watched_losses, strict=True)] == [True] * len(losses)
    state, watched_state = model.state_dict(), watched_model.state_dict()
    assert [name for name, value in state.items() if not torch.equal(value, watched_state[name])] == []
    assert after == random_states()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_watcher_takes_itself_off():
    model, optimizer, _ = runs.plain()
    before = hooks(model)
    with kbitcheck.watch(model, optimizer, steps=1) as watched:
        assert hooks(model) > before
        runs.loop(model, optimizer, steps=2)
        assert watched.over
        assert hooks(model) == before
    assert watched.report.subject["steps"] == 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [(comparisons, "compared"), (blocks.Recorder, "_left"), (batches.Batches, "_weighed"), (reach.Reach, "_runs")],
)
def test_a_watcher_that_fails_lets_the_run_go_on(monkeypatch, owner, name):
    def refuse(*args):
        raise OSError("no space")

    monkeypatch.setattr(owner, name, refuse)
    losses, _, watched = train(runs.plain, steps=3)
    assert len(losses) == 4
    assert watched.report.exit_code == 3
    reasons = {r.reason.partition(" (")[0] for r in watched.report if r.status is Status.ERROR}
    assert reasons == {"the watcher failed: OSError: no space"}


def test_a_run_without_a_step_is_no_run():
    model, optimizer, _ = runs.plain()
    with kbitcheck.watch(model, optimizer) as watched:
        pass
    assert watched.report.exit_code == 5
    with pytest.raises(kbitcheck.NonConformance):
        watched.raise_for_failures()


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((torch.nn.Linear(2, 2),), {}),
        (("tiny:llama",), {}),
        ((), {"steps": 0}),
        ((), {"profile": "none"}),
        ((), {"select": ["KB999"]}),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(arguments, options):
    with pytest.raises(kbitcheck.UsageError):
        kbitcheck.watch(*(arguments or (runs.load(),)), **options)


def test_a_trainer_s_callback_tells_the_verdict(tmp_path):
    from kbitcheck.integrations.transformers import Watch

    rows = [{name: value[0] for name, value in batch.items()} for batch in runs.batches(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no",
    )  # fmt: skip
    callback = Watch(steps=2)
    trainer = transformers.Trainer(runs.prepared(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    report = callback.report
    assert report is not None
    assert report.subject["steps"] == 2
    (said,) = [each for each in trainer.state.log_history if "kbitcheck" in each]
    assert (said["kbitcheck_exit_code"], said["step"]) == (0, 2)
    assert "trains as it should" in str(said["kbitcheck"])
    assert {r.rule for r in report if r.status is Status.PASS} >= {"KB304", "KB707", "KB710", "KB711"}


def test_the_fixture_fails_a_test_whose_run_does_not_conform(kbit_watch):
    model, optimizer, options = runs.labels_ignored()
    with pytest.raises(kbitcheck.NonConformance, match="KB714"), kbit_watch(model, optimizer, steps=1):
        runs.loop(model, optimizer, steps=1, **options)


def test_steps_of_kbitcheck_itself_are_not_the_runs():
    model, optimizer, _ = runs.plain()
    with kbitcheck.watch(model, optimizer, steps=2) as watched:
        kbitcheck.assert_prepared(model, select=["KB302"])
        runs.loop(model, optimizer, steps=1)
        kbitcheck.assert_prepared(model, select=["KB302"])
        runs.loop(model, optimizer, steps=1)
    assert watched.report.exit_code == 0
    assert {r.rule for r in watched.report if r.status is Status.PASS} >= {"KB304", "KB710", "KB711"}


def test_a_copy_of_a_watched_model_runs_and_is_not_watched():
    model, optimizer, _ = runs.plain()
    with kbitcheck.watch(model, optimizer, steps=2) as watched:
        runs.loop(model, optimizer, steps=1)
        twin = copy.deepcopy(model)
        runs.loop(twin, runs.adamw(twin), steps=1)
        runs.loop(model, optimizer, steps=1)
    assert watched.report.exit_code == 0
    assert watched.report.subject["steps"] == 2


def test_arguments_of_checkpointing_are_seen_through_a_wrapper():
    """LLaMA-Factory wraps what transformers checkpoints blocks with."""

    class Model(torch.nn.Module):
        gradient_checkpointing = True

        def __init__(self):
            super().__init__()
            checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
            self._gradient_checkpointing_func = functools.wraps(checkpoint, assigned=())(
                lambda *args: checkpoint(*args)
            )

    assert arguments(Model()) == {"use_reentrant": "True"}
