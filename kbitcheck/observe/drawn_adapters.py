"""The adapters that are drawn for a case, beside its own: their rank, their alpha, and the layers that they are on."""

import random
import re
from collections.abc import Sequence

from kbitcheck.core.adapters import LIBRARIES
from kbitcheck.core.cases import ALL_LINEAR, MODEL_RANK, OWN_RANK, AdaptersSpec, CaseSpec
from kbitcheck.core.conditions import TURNS, share
from kbitcheck.observe.blockwise.record import outermost_blocks
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes.adapters import linear_layers

RANKS = ((1, 2, 3), (9, 12, 16), (32, 48, 64))  # below the case's own, above eight, and as high as people go
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
ON_ALL, ON_ATTENTION, ON_NAMED = range(TURNS)


def drawn_adapters(loaded: Loaded, spec: CaseSpec, *, shared: bool = False) -> CaseSpec:
    """The case with adapters that depend on its seed; ``shared`` ones are the same for each case of a base.

    The case's own where the caller named or made them, where they are no library's plain LoRA, and on a large model, of
    which each further copy is dear.
    """
    named = spec.rank not in (OWN_RANK, MODEL_RANK) or spec.targets != ALL_LINEAR or spec.adapters not in LIBRARIES
    of_caller = not loaded.targets or not loaded.copies or bool(loaded.training.trains)
    if named or of_caller or loaded.large or loaded.of_large:
        return spec
    place = None if shared else share(spec.conditions)
    entropy = f"{spec.seed} {spec.model.rpartition('/')[2]}-{spec.quant}" if shared else spec.entropy
    generator = random.Random(f"adapters of {entropy}")  # noqa: S311
    # The cases of a suite that shares its conditions take turns at the ranks and at the layers.
    turn = None if place is None else place[0] // TURNS + spec.seed
    high, on = (generator.randrange(TURNS) if turn is None else (turn + moved) % TURNS for moved in (2, 1))
    rank = generator.choice(RANKS[high])
    alpha = generator.choice((max(rank // 2, 1), rank, 2 * rank))  # more would outweigh the layer
    return AdaptersSpec.of(spec, rank=rank, scaling=alpha / rank, layers=_layers(loaded, on, generator))


def _layers(loaded: Loaded, on: int, generator: random.Random) -> Sequence[str]:
    """All of the case's layers; or those of attention alone, or of some names, and those outside blocks, which lead to the others."""
    every = loaded.targets
    blocks = tuple(f"{block}." for block in outermost_blocks(loaded.pristine))
    within = [name for name in linear_layers(loaded.pristine, every) if name.startswith(blocks)]
    if on == ON_ATTENTION:
        chosen = {name for name in within if ATTENTION.search(name)}
    else:
        names = sorted({_last(name) for name in within})
        some = (
            generator.sample(names, generator.randint(1, len(names) - 1))
            if on == ON_NAMED and len(names) > 1
            else names
        )
        chosen = {name for name in within if _last(name) in some}
    if on == ON_ALL or not chosen:
        return every
    return [name for name in every if name in chosen or not name.startswith(blocks)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def described(spec: CaseSpec) -> str:
    """What its adapters are like, in words; empty for the case's own."""
    if spec.layers is None:
        return ""
    names = sorted({_last(name) for name in spec.layers})
    return f", adapters of rank {spec.rank} and alpha {spec.scaling * spec.rank:g} on {', '.join(names)}"
