"""What each of several GPUs holds: what DDP, FSDP2 and ZeRO-3 divide of a model whose packed weights are frozen.

* DistributedDataParallel divides nothing: each process has the model, its adapters, gradients and optimizer. The
  reducer's buckets hold the gradients a second time (``gradient_as_bucket_view=False``, torch's default).
* FSDP2 (``fully_shard`` on each block and on the root) divides parameters, gradients and optimizer. It gathers the next
  block while one computes, and what is outside the blocks stays gathered from the forward to the backward
  (``reshard_after_forward``: by default not the root's). Quantization states and buffers are no parameters: every GPU
  has all of them. Packed weights are divided where the backend says so.
* ZeRO-3 divides the same and gathers as much. Parameters of fewer than ``stage3_param_persistence_threshold`` elements
  (100,000), as adapters mostly are, stay whole on every GPU (DeepSpeed's docs, "ZeRO-3 options").
* A k-bit model is quantized before DDP and ZeRO-3 get it, on each GPU as a whole (DeepSpeed#5637, peft#2016). FSDP can
  start from one copy in the host's memory (accelerate's ``fsdp_cpu_ram_efficient_loading``).
* FSDP2 wants one dtype of what trains in a unit (``fully_shard``: "FSDP expects uniform original parameter dtype"); adapters are float32.
  accelerate casts what trains to float32, unless the model holds Params4bit (accelerate#3987), so that a head that is trained beside
  the adapters keeps its dtype. FSDP of the first version joins all of a unit, frozen ones too, into one tensor of one floating dtype.
* Activations, logits and workspaces belong to each GPU's own batch.
"""

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.anatomy import norm_parameters
from kbitcheck.core.facts import HALF, ForecastFacts, ModelFacts
from kbitcheck.core.facts.fit import ShareFacts
from kbitcheck.core.profile import PROMISES

GATHERED_BLOCKS = 2
ADAPTERS = "float32"  # as PEFT makes them


def of_gpus(
    forecast: ForecastFacts, facts: ModelFacts, quant: Quantization, gpus: int, *, peak: int
) -> tuple[ShareFacts, ...]:
    """Bytes on each of ``gpus`` GPUs where each has a batch whose step takes ``peak`` bytes, gradients included."""

    def share(nbytes: int) -> int:
        return -(-nbytes // gpus)

    prepared, adapters = forecast.loaded + forecast.upcast, forecast.adapters
    optimizer, activations = forecast.optimizer[forecast.chosen], max(peak - adapters, 0)
    undivided = quant.backend.packing.undivided(quant)
    whole = sum(g.state + g.buffers + (g.packed if undivided else 0) for g in forecast.groups.values())
    weights = whole + share(prepared - whole)
    units = _units(forecast, facts, packed=not undivided)
    root, blocks = units.pop("", 0), sorted(units.values())
    gathered = root + sum(blocks[-GATHERED_BLOCKS:])
    gathered -= share(gathered)
    return (
        ShareFacts(
            strategy="DDP", weights=prepared, adapters=adapters, gradients=adapters, optimizer=optimizer,
            activations=activations, extra=adapters, loads_whole=True, note="divides the batch alone",
        ),
        ShareFacts(
            strategy="FSDP2", weights=weights, adapters=share(adapters), gradients=share(adapters),
            optimizer=share(optimizer), activations=activations, extra=gathered, loads_whole=False, note=undivided,
            dtypes=_dtypes(forecast, facts),
        ),
        ShareFacts(
            strategy="ZeRO-3", weights=weights, adapters=adapters, gradients=share(adapters),
            optimizer=share(optimizer), activations=activations, extra=gathered, loads_whole=True, note=undivided,
        ),
    )  # fmt: skip


def _dtypes(forecast: ForecastFacts, facts: ModelFacts) -> str:
    """What FSDP says to the dtypes of a unit: the first block that has more than one, or else the rest of the model."""
    units: dict[str, set[str]] = {}
    names, norms, promise = [block.name for block in facts.blocks], norm_parameters(facts), PROMISES[forecast.profile]
    for name, tensor in facts.parameters.items():
        unit = next((block for block in names if name.startswith(block + ".")), "the rest of the model")
        wide = not tensor.packed and tensor.dtype in HALF and promise.casts(norm=name in norms)
        units.setdefault(unit, {ADAPTERS}).add(ADAPTERS if wide else tensor.dtype)
    mixed = next((unit for unit in [*names, *units] if len(units.get(unit, ())) > 1), "")
    trained = f"one dtype trains in each unit, {ADAPTERS}, unless a module in half precision is trained beside the adapters (accelerate#3987)"
    if not mixed:
        return trained
    return f"{trained}; FSDP of the first version refuses units of {' and '.join(sorted(units[mixed]))} ({mixed})"


def _units(forecast: ForecastFacts, facts: ModelFacts, *, packed: bool) -> dict[str, int]:
    """Prepared bytes of the parameters of each block that are divided; "" is what belongs to none."""
    norms, promise = norm_parameters(facts), PROMISES[forecast.profile]
    names = [block.name for block in facts.blocks]
    units = dict.fromkeys(["", *names], 0)
    seen: set[int] = set()
    for name, tensor in facts.parameters.items():
        if tensor.storage in seen or (tensor.packed and not packed):
            continue
        seen.add(tensor.storage)
        unit = next((block for block in names if name.startswith(block + ".")), "")
        wide = not tensor.packed and tensor.dtype in HALF and promise.casts(norm=name in norms)
        units[unit] += tensor.nbytes * (2 if wide else 1)
    return units
