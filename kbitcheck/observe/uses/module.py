"""What a module promises: its methods, evaluation, generation, saving and loading."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save

from kbitcheck.observe.probes import forwards
from kbitcheck.observe.uses.subject import Outcome, Subject, Value, attempt, floating, numbers, use

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


@use
def evaluation_with_adapters(subject: Subject) -> Outcome:
    """Their effect, too: the logits with adapters that do nothing."""
    model, adapters = subject.attached()
    seen: dict[str, Value] = {"the logits": subject.logits(model)}
    seen["the logits in inference mode"] = subject.logits(model, without=torch.inference_mode).clone()
    if (drawn := subject.drawn()) is not None:
        seen["the logits of several rows"] = subject.logits(model, drawn)
    for parameter in adapters.values():
        parameter.data.zero_()
    return {**seen, "the logits without adapters": subject.logits(model)}


@use
def generation_with_adapters(subject: Subject) -> Outcome:
    model, _ = subject.attached()
    if not subject.preparation.loaded.generator:
        return {}
    _, raised, routed = forwards.token_by_token(model, subject.batch)
    return {"the logits": raised or (routed.logits if routed else "none")}


@use
def evaluation_between_steps(subject: Subject) -> Outcome:
    model, adapters = subject.attached()
    first = subject.step(model, adapters)
    logits = subject.logits(model)
    modes = {m.training for m in model.modules()}
    again = subject.step(model, adapters)
    return {
        "the logits": logits,
        "modes in evaluation": str(modes),
        **{f"{n}, again": v for n, v in again.items()},
        **first,
    }


@use
def flags_and_modes(subject: Subject) -> Outcome:
    model = subject.model
    seen: dict[str, Value] = {"names of parameters": str([n for n, _ in model.named_parameters()])}
    seen["names of modules"] = str([n for n, _ in model.named_modules()])
    for thaw in (True, False):
        for parameter in floating(model).values():
            parameter.requires_grad_(thaw)
        wrong = [n for n, p in floating(model).items() if p.requires_grad is not thaw]
        seen[f"requires_grad_({thaw})"] = f"did nothing to {', '.join(wrong)}" if wrong else "done"
        model.train(thaw)
        seen[f"train({thaw})"] = str({m.training for m in model.modules()})
    return seen


@use
def its_state_loaded_again(subject: Subject) -> Outcome:
    model, _ = subject.attached()
    logits = subject.logits(model)
    kept = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    answer = model.load_state_dict(kept, strict=False)
    keys = f"missing {answer.missing_keys}, unexpected {answer.unexpected_keys}"
    return {"the keys": keys, "the logits before": logits, "the logits after": subject.logits(model)}


@use
def adapters_saved_in_each_dtype(subject: Subject) -> Outcome:
    model, adapters = subject.attached()
    seen: dict[str, Value] = {}
    for dtype in HALF_AND_SINGLE:
        saved = load(save({n: p.detach().to(dtype).contiguous() for n, p in adapters.items()}))
        for name, parameter in adapters.items():
            parameter.data.zero_().copy_(saved[name])
        seen[f"the logits, saved in {str(dtype).removeprefix('torch.')}"] = subject.logits(model)
    return seen


@use
def a_copy_and_a_pickle(subject: Subject) -> Outcome:
    model, _ = subject.attached()
    copied = attempt(lambda: subject.logits(copy.deepcopy(model)))
    return {"a deep copy": copied, "a pickle": attempt(lambda: subject.logits(pickle.loads(_pickled(model))))}  # noqa: S301


def _pickled(model: Any) -> bytes:
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    return buffer.getvalue()


@use
def moves_and_casts(subject: Subject) -> Outcome:
    """What ``to``, ``half`` and ``float`` do, of which quantized models refuse some."""
    model = subject.model
    device = next(model.parameters()).device
    actions: dict[str, Callable[[], Any]] = {
        "to(device)": lambda: model.to(device),
        "to(float32)": lambda: model.to(torch.float32),
        "half()": model.half,
        "float()": model.float,
    }
    return {name: attempt(lambda act=act: _dtypes(act())) for name, act in actions.items()}  # type: ignore[misc]


def _dtypes(model: Any) -> str:
    return str(sorted({str(p.dtype) for p in model.parameters()}))


@use
def adapters_merged(subject: Subject) -> Outcome:
    attached = subject.with_peft()
    if attached is None:
        return {}
    model: Any = attached.model
    seen: dict[str, Value] = {"the logits": subject.logits(model)}
    seen["classes of adapters"] = str(
        sorted({type(m).__name__ for n, m in model.named_modules() if hasattr(m, "lora_A")})
    )
    seen["the logits, merged"] = subject.logits(model.merge_and_unload())
    return seen


@use
def the_model_trained_whole(subject: Subject) -> Outcome:
    """All that is not packed trains, beside the adapters, for three steps."""
    model, adapters = subject.attached()
    trained = {**adapters, **floating(model)}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    start = numbers(trained.values())
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        subject.loss(model).backward()
        optimizer.step()
    return {"what training changed": numbers(trained.values()) - start, "the loss": subject.loss(model).detach()}
