"""Loops as users write them, watched as ``kbitcheck watch`` does: broken ones are named in three steps, sound ones are not, no bit changes."""

import json
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kbitcheck.core.report import Report
from kbitcheck.core.result import Level, Party, Status
from kbitcheck.core.rule import rules
from kbitcheck.observe.watch import comparisons, head
from kbitcheck.run import watched_process
from tests.watch import broken_runs, late_loops, loops, own_loops, runs, sound_runs, unusual_loops

# What the watcher alone sees; the others take the paths of these.
FAST = {
    "two_optimizers", "an_optimizer_for_each_tensor", "closures", "scaler_that_skips_the_first_steps", "scaler_and_clipping",
    "scaler_that_skips_all", "clipped_before_unscaled", "in_eval_mode", "a_hundredth_of_a_gradient_in_every_block",
    "padding_that_counts", "outputs_kept_by_hooks",
    "not_shifted", "tokens_detached_behind_the_blocks", "an_optimizer_for_each_step", "an_average_written_back", "graphs_retained",
    "one_of_two_losses_unscaled", "half_of_the_batch_without_gradients", "chosen_and_rejected",
    "gradients_never_cleared", "encoder_and_decoder", "gradients_cleared_between_batches", "left_in_eval_mode",
    "labels_of_other_rows", "seeded_before_each_step",
    "a_loss_negated", "a_loss_maximized", "weights_that_decay_at_once", "decays_much",
    "an_epoch_that_ends_within_a_step", "accumulated_losses_undivided", "a_schedule_stepped_with_every_batch",
    "a_decoder_that_reads_its_labels", "rows_of_two_tokens", "factors_that_are_both_zero", "a_loss_times_zero",
    "an_epsilon_that_dwarfs_gradients",
    "padding_on_the_left_without_a_mask", "halved_behind_the_last_norm", "halved_between_blocks", "a_hook_lost_after_a_save",
}  # fmt: skip


def each(items):
    for item in items:
        run, *more = item if isinstance(item, tuple) else (item,)
        marks = () if run.__name__ in FAST else (pytest.mark.slow,)
        yield pytest.param(run, *more, id=run.__name__, marks=marks)


def watched(run, folder):
    """What a run returns, and the report of its first three steps."""
    waiting = watched_process._Waiting({"folder": str(folder), "settings": {"steps": 3}, "libraries": []})
    waiting.begin()
    waiting.see_checkpointing()
    try:
        torch.manual_seed(3)
        returned = run()
    finally:
        waiting._end()
        waiting._remove()
    (path,) = folder.glob("*.json")
    return returned, Report.from_json(json.loads(path.read_text())["report"])


def broken(report):
    return {r.rule for r in report if r.status is Status.FAIL and r.level is not Level.INFO}


@pytest.mark.parametrize("run", [*each((*sound_runs.SOUND, *own_loops.SOUND, *unusual_loops.SOUND, *late_loops.SOUND))])
def test_a_sound_run_is_not_named_and_no_bit_of_it_changes(run, tmp_path):
    (model, losses), report = watched(run, tmp_path)
    assert broken(report) <= {"KB907"}
    assert report.exit_code == 0
    assert report.subject["steps"] == 3
    assert {"KB104", "KB710", "KB715"} <= {r.rule for r in report if r.status is Status.PASS}
    torch.manual_seed(3)
    alone, losses_alone = run()
    assert [a.equal(b) for a, b in zip(losses, losses_alone, strict=True)] == [True] * len(losses)
    state = alone.state_dict()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])] == []


@pytest.mark.parametrize(
    ("run", "code"),
    [*each((broken_runs.BROKEN | own_loops.BROKEN | unusual_loops.BROKEN | late_loops.BROKEN).items())],
)
def test_a_broken_run_is_named(run, code, tmp_path):
    _, report = watched(run, tmp_path)
    assert code in broken(report)
    assert report.exit_code == (0 if rules()[code].level is Level.SHOULD else 1)


@pytest.mark.parametrize(("run", "note"), [*each((own_loops.NOTED | unusual_loops.NOTED).items())])
def test_what_may_be_meant_so_is_a_note(run, note, tmp_path):
    code, text = note
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, report = watched(run, tmp_path)
    assert (broken(report), report.exit_code) == (set(), 0)
    assert any(text in said for r in report if r.rule == code for said in r.notes)


def test_experts_are_compared(tmp_path):
    _, report = watched(late_loops.mixture, tmp_path)
    # transformers 5 leaves fused experts unquantized, 4 quantizes routers
    assert broken(report) <= {"KB901", "KB910"}
    assert {r.status for r in report if r.rule == "KB304"} == {Status.PASS}


def test_a_cast_in_mid_run_is_named(tmp_path):
    _, report = watched(late_loops.cast_in_mid_run, tmp_path)
    (result,) = (r for r in report if r.rule == "KB313")
    assert {f.actual for f in result.failures} == {"half precision: it was cast after the optimizer was built"}
    assert len(result.failures) == 28


def test_gates_that_rounding_moves_are_no_fault(tmp_path):
    _, report = watched(late_loops.relus_under_autocast, tmp_path)
    assert broken(report) <= {"KB313"}
    assert {r.status for r in report if r.rule == "KB304"} == {Status.PASS}


@pytest.mark.parametrize(
    "run",
    [
        runs.plain,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (runs.head_saved, runs.autocast_over_float32)),
    ],
    ids=lambda run: run.__name__,
)
def test_some_tokens_of_a_large_head_are_compared(run, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "SMALL", 1)
    monkeypatch.setattr(comparisons, "SMALL", 1)

    def train():
        model, optimizer, _ = run()
        return model, loops.each_step(model, optimizer)

    (_, losses), report = watched(train, tmp_path)
    assert (broken(report), report.exit_code) == (set(), 0)
    torch.manual_seed(3)
    assert [a.equal(b) for a, b in zip(losses, train()[1], strict=True)] == [True] * len(losses)


@pytest.mark.parametrize(
    "run",
    [unusual_loops.halved_before_the_head, pytest.param(late_loops.scaled_behind_the_head, marks=pytest.mark.slow)],
    ids=lambda run: run.__name__,
)
def test_a_fault_beside_a_large_head_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "SMALL", 1)
    monkeypatch.setattr(comparisons, "SMALL", 1)
    _, report = watched(run, tmp_path)
    places = {f.where.partition(" ")[0] for r in report if r.rule == "KB304" for f in r.failures}
    assert places == {"base_model.model.lm_head"}


def test_every_rule_of_loops_has_a_broken_run():
    own = {code for code, rule in rules().items() if rule.family in ("loop", "watched", "batches", "optimizer")}
    several = runs.BROKEN | broken_runs.BROKEN | own_loops.BROKEN | unusual_loops.BROKEN | late_loops.BROKEN
    assert own <= {*several.values(), "KB706", "KB719"}


def test_a_users_own_hooks_on_optimizers_are_called_while_the_watcher_takes_its_own_off(tmp_path):
    called = []

    def run():
        model = runs.prepared()
        plain = loops.each_step(model, runs.adamw(model), between=hook_on)
        return model, plain

    def hook_on(model, step):
        if step == 0:
            handles.append(register_optimizer_step_post_hook(lambda *_: called.append("after")))
            handles.append(register_optimizer_step_pre_hook(lambda *_: called.append("before")))

    handles: list[Any] = []
    try:
        _, report = watched(run, tmp_path)
    finally:
        for handle in handles:
            handle.remove()
    assert report.subject["steps"] == 3
    assert called == ["before", "after"] * (loops.STEPS - 1)


def test_what_int8_layers_keep_is_the_stacks(tmp_path):
    def run():
        how = {"use_reentrant": False}
        prepared = prepare_model_for_kbit_training(runs.load(scheme="int8"), gradient_checkpointing_kwargs=how)
        model = get_peft_model(prepared, runs.lora())
        return model, loops.each_step(model, runs.adamw(model))

    _, report = watched(run, tmp_path)
    (result,) = [r for r in report if r.rule == "KB722"]
    assert result.status is Status.FAIL
    assert {failure.party for failure in result.failures} == {Party.STACK}
    assert report.exit_code == 0


def test_what_an_evaluation_and_a_save_leave_of_scales_is_the_stacks(tmp_path):
    """And no block is compared with what it was before."""
    _, report = watched(late_loops.repacked_and_saved, tmp_path)
    failed = {r.rule: {f.party for f in r.failures} for r in report if r.status is Status.FAIL}
    assert (failed, report.exit_code) == ({"KB104": {Party.STACK}}, 0)


def test_why_no_block_was_compared_is_said(tmp_path):
    _, report = watched(sound_runs.closures, tmp_path)
    reasons = {r.reason for r in report if r.rule == "KB304"}
    assert reasons == {"no block was compared: the optimizer runs the model itself, in a closure"}
    assert "gradients were not judged: no block was compared" in " ".join(str(report).split())


def test_a_scale_that_still_falls_is_a_note(tmp_path):
    _, report = watched(sound_runs.scaler_whose_scale_still_falls, tmp_path)
    assert broken(report) == set()
    (result,) = (r for r in report if r.rule == "KB717")
    assert result.notes == ("the gradient scaler skipped all 3 steps: --steps watches until one is taken",)
    assert "no block was compared: a gradient scaler skipped every step" in " ".join(str(report).split())


def test_a_warning_that_matters_is_among_many(tmp_path):
    """And goes on to where it would go."""

    def run():
        model = runs.prepared()
        with pytest.warns(UserWarning, match="None of the inputs"):
            warnings.warn("None of the inputs have requires_grad=True. Gradients will be None", stacklevel=1)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("None of the inputs have requires_grad=True. Gradients will be None", stacklevel=1)
            warnings.warn("a new release is there", stacklevel=1)
        return loops.each_step(model, runs.adamw(model))

    _, report = watched(run, tmp_path)
    (result,) = (r for r in report if r.rule == "KB719")
    assert [(f.where, f.actual) for f in result.failures] == [
        ("checkpointing", "None of the inputs have requires_grad=True. Gradients will be None")
    ]
