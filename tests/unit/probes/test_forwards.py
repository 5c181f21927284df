"""What a forward under a condition of its own shows."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from kbitcheck.observe.probes import forwards


class Cut(torch.autograd.Function):
    """A product whose kernel has no backward."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return None


class Model(nn.Module):
    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.cut = nn.Embedding(10, 4), nn.Linear(4, 10), cut

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs_embeds, labels, attention_mask=None):
        logits = self.head(Cut.apply(inputs_embeds) if self.cut else inputs_embeds)
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


@pytest.mark.parametrize("cut", [False, True])
def test_a_gradient_comes_back_to_embeddings_that_are_fed(cut: bool) -> None:
    ids = torch.arange(6).view(2, 3)
    finite, raised, _ = forwards.embedded(Model(cut=cut), {"input_ids": ids, "labels": ids})
    assert finite
    assert (raised is not None) is cut
