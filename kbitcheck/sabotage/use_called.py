"""Faults of KB515 that show in what is done between steps, in other circumstances of a step, and in other calls of the forward."""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from kbitcheck.sabotage.fault import adds, breaks
from kbitcheck.sabotage.gradients import scaled
from kbitcheck.sabotage.hooks import change_output
from kbitcheck.sabotage.use import second_norm

BETWEEN = "steps with something between"
KEYWORDS = "keywords of the forward"


@breaks("KB515", conditions=BETWEEN)
def off_after_a_state_dict(model: Any) -> None:
    taken: list[bool] = []
    model.register_state_dict_pre_hook(lambda *_: taken.append(True))
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if taken else x)


@adds("KB515", conditions=BETWEEN, last=True)
def off_after_a_generation(model: Any) -> None:
    generated: list[bool] = []

    def change(x: torch.Tensor) -> torch.Tensor:
        if not model.training and x.shape[1] == 1:
            generated.append(True)
        return scaled(x, 0.5) if generated and model.training else x

    change_output(second_norm(model), change)


@breaks("KB515", conditions="a step in another thread")
def right_in_the_main_thread_alone(model: Any) -> None:
    main = threading.main_thread()
    change_output(second_norm(model), lambda x: x if threading.current_thread() is main else scaled(x, 0.5))


@adds("KB515", conditions="a step in another thread", last=True)
def off_on_several_threads(model: Any) -> None:
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if torch.get_num_threads() > 1 else x)


@breaks("KB515", conditions="adapters that start at zero")
def right_if_adapters_do_not_start_at_zero(model: Any) -> None:
    zero: list[bool] = []

    def change(x: torch.Tensor) -> torch.Tensor:
        if not zero and any(p.requires_grad for p in model.parameters()):
            zero.append(any(not p.any() for p in model.parameters() if p.requires_grad))
        return scaled(x, 0.5) if zero == [True] else x

    change_output(second_norm(model), change)


@adds("KB515", conditions="adapters that start at zero", last=True)
def off_for_a_rank_above_eight(model: Any) -> None:
    def wide() -> bool:
        return any(p.requires_grad and p.dim() == 2 and min(p.shape) > 8 for p in model.parameters())

    change_output(second_norm(model), lambda x: scaled(x, 0.5) if wide() else x)


@breaks("KB515", conditions="prepared under a launcher")
def off_under_a_launcher(model: Any) -> None:
    if "LOCAL_RANK" in os.environ:
        change_output(second_norm(model), lambda x: scaled(x, 0.5))


def _off_for_calls(model: Any, which: Callable[[Any], bool]) -> None:
    """Halve a gradient in forwards with such keywords."""
    passed: dict[str, Any] = {}

    def see(module: Any, args: Any, keywords: Any) -> None:
        passed.clear()
        passed.update(keywords)

    model.register_forward_pre_hook(see, with_kwargs=True)
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if which(passed) else x)


@breaks("KB515", conditions=KEYWORDS)
def gradients_halved_without_labels(model: Any) -> None:
    _off_for_calls(model, lambda passed: passed.get("labels") is None)


@breaks("KB515", conditions=KEYWORDS)
def gradients_halved_with_positions(model: Any) -> None:
    _off_for_calls(model, lambda passed: passed.get("position_ids") is not None)


@breaks("KB515", conditions=KEYWORDS)
def gradients_halved_for_a_row_of_a_power_of_two(model: Any) -> None:
    def single(x: torch.Tensor) -> bool:
        return len(x) == 1 and x.shape[1] in (64, 128, 256, 512, 1024)

    change_output(second_norm(model), lambda x: scaled(x, 0.5) if single(x) else x)


@adds("KB515", conditions=KEYWORDS, last=True)
def gradients_halved_with_tuples(model: Any) -> None:
    _off_for_calls(model, lambda passed: passed.get("return_dict") is False)


@adds("KB515", conditions=KEYWORDS, last=True)
def gradients_halved_for_fewer_logits(model: Any) -> None:
    _off_for_calls(model, lambda passed: bool(passed.get("logits_to_keep")))


@breaks("KB515", conditions=KEYWORDS)
def gradients_halved_with_hidden_states(model: Any) -> None:
    _off_for_calls(model, lambda passed: bool(passed.get("output_hidden_states")))


@breaks("KB515", conditions=KEYWORDS)
def gradients_halved_with_wide_masks(model: Any) -> None:
    _off_for_calls(model, lambda passed: getattr(passed.get("attention_mask"), "ndim", 2) > 2)


@adds("KB515", conditions=KEYWORDS, last=True)
def hidden_states_narrower_than_the_base_s(model: Any) -> None:
    def narrow(module: Any, args: Any, output: Any) -> None:
        if getattr(output, "hidden_states", None):
            output["hidden_states"] = tuple(h.bfloat16() for h in output.hidden_states)

    model.register_forward_hook(narrow)


@adds("KB515", conditions=KEYWORDS, last=True)
def keywords_alone_are_taken(model: Any) -> None:
    def refuse(module: Any, args: Any, keywords: Any) -> None:
        if args:
            raise TypeError("no positional arguments here")

    model.register_forward_pre_hook(refuse, with_kwargs=True)


@breaks("KB515", conditions=BETWEEN)
def off_after_a_save(model: Any) -> None:
    saved: list[bool] = []
    save = model.save_pretrained

    def noting(*args: Any, **kwargs: Any) -> Any:
        saved.append(True)
        return save(*args, **kwargs)

    model.save_pretrained = noting
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if saved else x)


@adds("KB515", conditions=BETWEEN, last=True)
def off_after_a_forward_without_gradients(model: Any) -> None:
    seen: list[bool] = []

    def note(module: Any, args: Any) -> None:
        if model.training and not torch.is_grad_enabled():
            seen.append(True)

    model.register_forward_pre_hook(note)
    change_output(second_norm(model), lambda x: scaled(x, 0.5) if seen else x)


@adds("KB515", conditions="embeddings in place of ids", last=True)
def gradients_halved_with_embeddings(model: Any) -> None:
    _off_for_calls(model, lambda passed: passed.get("inputs_embeds") is not None)
