"""A model on which steps ran is afterwards bitwise what it was."""

import contextlib
import copy
import random

import numpy
import pytest
import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.models.sources.resolve import source_of
from kbitcheck.observe.in_place import left_as_it_was


@pytest.fixture(params=["nf4", "int8"])
def model(request):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    spec = CaseSpec(model="tiny:llama", quant=request.param, implementation="peft")
    base = source_of(spec).load(Quantization.parse(spec.quant), "cpu")
    model = get_peft_model(prepare_model_for_kbit_training(base), LoraConfig(target_modules=["q_proj"]))
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    return model


def state(model):
    """Everything that must not change, as values that compare."""
    return (
        {n: (p.data_ptr(), p.requires_grad, p.detach().clone(), p.grad is None or p.grad.clone()) for n, p in model.named_parameters()},
        {n: (type(m), m.training, list(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()},
        {n: b.clone() for n, b in model.named_buffers()},
        {n: {k: id(v) for k, v in vars(m.state).items()} for n, m in model.named_modules() if hasattr(m, "state")},
        copy.deepcopy(model.config.to_dict()),
        torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state()),
    )  # fmt: skip


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return all(map(equal, a, b)) and len(a) == len(b) if isinstance(a, (tuple, list)) else a == b


def disturb(model):
    """What probes do to a model, and worse."""
    ids = torch.arange(24).reshape(2, 12)
    model.config.use_cache = True
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 1
    handle = model.register_forward_hook(lambda *_: None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.base_model.model.model.layers[0].self_attn.q_proj = torch.nn.Linear(2, 2)
    model.base_model.model.model.rotary_emb.inv_freq.mul_(2)
    model.forward = lambda: None
    model.gradient_checkpointing_disable()
    random.random(), numpy.random.rand(), torch.rand(1)
    return handle


@pytest.mark.parametrize("fails", [False, True])
def test_left_as_it_was(model, fails):
    before = state(model)
    with contextlib.suppress(KeyError), left_as_it_was(model):
        disturb(model)
        assert not equal(before, state(model))
        if fails:
            raise KeyError
    assert equal(before, state(model))
    model(input_ids=torch.arange(4)[None])
