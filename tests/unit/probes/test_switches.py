"""What a probe switches is as before afterwards."""

import torch

from kbitcheck.observe.probes import switches


def test_a_model_that_asks_for_a_seed_of_the_systems_gets_the_probes():
    """As Reformer, which hashes by it: no two steps would be alike."""
    own, state = torch.seed, torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with switches.seeded(7, {}):
            torch.manual_seed(torch.seed())
            drawn.append(torch.rand(3))
    assert drawn[0].equal(drawn[1])
    assert torch.seed is own
    assert torch.get_rng_state().equal(state)
