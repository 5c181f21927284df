"""What probes see, as plain data: frozen, torch-free, comparable. Sizes are in bytes, dtypes are torch's names ("float32").

A digest is a hexadecimal hash; equal digests mean equal bits (``bits``) or equal numbers (``value``).
"""

from kbitcheck.core.facts.blockwise import BlockwiseFacts, Gap, Part, median_yardstick, vanishing
from kbitcheck.core.facts.case import Computed, Fact, Facts, fact
from kbitcheck.core.facts.composition import CompositionFacts, ProcessFacts
from kbitcheck.core.facts.cost import Cost, Passes
from kbitcheck.core.facts.cut import CutFacts, Tower
from kbitcheck.core.facts.memory import CostFacts, ForecastFacts, GroupFacts, HeldFacts, MemoryFacts
from kbitcheck.core.facts.model import (
    FLOATING,
    HALF,
    AdaptersFirst,
    CallFacts,
    CallForm,
    Changes,
    LayerFacts,
    ModelFacts,
    ModuleFacts,
    QuantizerFacts,
    RefusedCall,
    StoredFacts,
    TensorFacts,
)
from kbitcheck.core.facts.rounding import FLOAT32_ULP, YARDSTICKS
from kbitcheck.core.facts.step import (
    CANNOT_RUN,
    CERTAIN,
    WIDEST,
    BlockFacts,
    Distance,
    DrawnFacts,
    ForwardFacts,
    FunctionFacts,
    HonouredArguments,
    LaterFacts,
    LayerBackward,
    MisreadLayout,
    RouterFacts,
    RunFacts,
    StartFacts,
    StepOutcome,
    StoreFacts,
    TrainingFacts,
    slope_bound,
)
from kbitcheck.core.facts.unwatched import UnwatchedFacts
from kbitcheck.core.facts.use import UseFacts
from kbitcheck.core.facts.watched import (
    Cut,
    HeardWarning,
    MicroBatch,
    Replica,
    ScalerFacts,
    SwitchedOn,
    Teaching,
    Update,
    WatchedRun,
    WatchedStep,
)

__all__ = [
    "CANNOT_RUN", "CERTAIN", "FLOAT32_ULP", "FLOATING", "HALF", "WIDEST", "YARDSTICKS", "AdaptersFirst", "BlockFacts", "BlockwiseFacts",
    "CallFacts", "CallForm", "Changes", "CompositionFacts", "Computed", "Cost", "CostFacts", "Cut", "CutFacts", "Distance", "DrawnFacts",
    "Fact", "Facts", "ForecastFacts", "ForwardFacts", "FunctionFacts", "Gap", "GroupFacts", "HeardWarning", "HeldFacts",
    "HonouredArguments", "LaterFacts", "LayerBackward", "LayerFacts", "MemoryFacts", "MicroBatch", "MisreadLayout", "ModelFacts", "ModuleFacts",
    "Part", "Passes", "ProcessFacts", "QuantizerFacts", "RefusedCall", "Replica", "RouterFacts", "RunFacts", "ScalerFacts", "StartFacts",
    "StepOutcome", "StoreFacts", "StoredFacts", "SwitchedOn", "Teaching", "TensorFacts", "Tower", "TrainingFacts", "UnwatchedFacts",
    "Update", "UseFacts", "WatchedRun", "WatchedStep", "fact", "median_yardstick", "slope_bound", "vanishing",
]  # fmt: skip
