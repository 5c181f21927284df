"""What probes see, as plain data: frozen, torch-free, comparable. Sizes are in bytes, dtypes are torch's names ("float32").

A digest is a hexadecimal hash; equal digests mean equal bits (``bits``) or equal numbers (``value``).
"""

from kbitcheck.core.facts.case import Facts
from kbitcheck.core.facts.forecast import ForecastFacts, GroupFacts, HeldFacts
from kbitcheck.core.facts.memory import CostFacts, MemoryFacts
from kbitcheck.core.facts.model import (
    FLOATING,
    HALF,
    CallFacts,
    LayerFacts,
    ModelFacts,
    ModuleFacts,
    TensorFacts,
)
from kbitcheck.core.facts.step import (
    CANNOT_RUN,
    BlockFacts,
    Distance,
    ForwardFacts,
    FunctionFacts,
    GradientFacts,
    LayerBackward,
    RunFacts,
    StepOutcome,
    StoreFacts,
    TrainingFacts,
)

__all__ = [
    "CANNOT_RUN",
    "FLOATING",
    "HALF",
    "BlockFacts",
    "CallFacts",
    "CostFacts",
    "Distance",
    "Facts",
    "ForecastFacts",
    "ForwardFacts",
    "FunctionFacts",
    "GradientFacts",
    "GroupFacts",
    "HeldFacts",
    "LayerBackward",
    "LayerFacts",
    "MemoryFacts",
    "ModelFacts",
    "ModuleFacts",
    "RunFacts",
    "StepOutcome",
    "StoreFacts",
    "TensorFacts",
    "TrainingFacts",
]
