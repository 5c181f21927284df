"""What a backend is: a folder that holds all that is known of one quantizer. Importing this imports no torch.

Every hook has a neutral default. A backend whose ``recognition`` alone is filled in is recognised; with ``config`` and
``packing`` it gets the static audit; with all parts the full audit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kbitcheck.backends.schemes import Choice, Scheme
from kbitcheck.core.errors import NotApplicable, UsageError
from kbitcheck.core.finding import Finding, read_findings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Recognition:
    """Which modules and parameters hold packed weights, and what they hold."""

    def holds(self, module: nn.Module) -> bool:
        """True for a module that owns a packed weight together with the state that unpacks it."""
        return False

    def packs(self, parameter: Tensor) -> bool:
        """True for a packed weight, of a subclass too."""
        return False

    def packed(self, module: Any) -> Tensor:
        """The packed weight that the module owns."""
        weight: Tensor = module.weight
        return weight

    def multiplies(self, module: nn.Module) -> bool:
        """False for a holder that another module reads the unpacked weight from, as from a parametrized stack of experts."""
        return True

    def scheme(self, module: nn.Module) -> str:
        """Name of the module's scheme."""
        raise NotImplementedError

    def emptied(self, module: nn.Module) -> str:
        """The scheme of the library's own layer whose weight something else holds now, as FSDP does; "" for any other module."""
        return ""

    def shape(self, module: Any) -> tuple[int, int]:
        """(out features, in features) of the unpacked weight; of a stack the rows of all its experts, and their columns."""
        return int(module.out_features), int(module.in_features)

    def experts(self, module: nn.Module) -> int:
        """How many matrices of one shape the weight stacks."""
        return 1

    def stacks(self, module: nn.Module) -> Mapping[str, tuple[str, tuple[int, int]]]:
        """Scheme and unpacked shape, (out, in) of all experts together, of each parameter that packs the weights of several experts."""
        return {}

    def state(self, module: nn.Module) -> Mapping[str, Any]:
        """The fields of the quantization state by name: tensors and plain values."""
        return {}

    def laid_out_before(self, module: nn.Module) -> Tensor | None:
        """The packed weight as it was before a forward of the library's own laid it out anew; None where none did."""
        return None

    def scratch(self, module: nn.Module) -> list[Tensor]:
        """Tensors that the layer's own kernels keep from one call to the next."""
        return []

    def bare(self, module: nn.Module) -> nn.Module:
        """The library's own layer on the same weight and state: no subclass, no hook, no forward of the instance's."""
        return module

    def corrupt(self, module: nn.Module, part: str, factor: float = 1.02) -> None:
        """Break the packed weight in place: a ``code``, a ``scale`` (times ``factor``) or the ``nested`` state.

        Raises:
            NotApplicable: the scheme has no such part.
        """
        raise NotApplicable(f"{type(module).__name__} has no {part} to corrupt")


class Arithmetic:
    """How a layer computes. The float twins and the bound of KB303 read this and nothing else.

    ``multiplies_unpacked``: on a CPU its product has the bits of torch's own with the unpacked weight.
    """

    multiplies_unpacked: ClassVar[bool] = False

    def compute_dtype(self, module: nn.Module) -> torch.dtype | None:
        """The dtype of the layer's products; None where the products follow the layer's input."""
        return None

    def product_dtype(self, module: nn.Module, x: Tensor) -> torch.dtype:
        """The dtype in which a layer without a compute dtype multiplies ``x`` in training, and which it returns."""
        return x.dtype

    def unpacked_dtype(self, module: nn.Module) -> torch.dtype | None:
        """The dtype that the backward unpacks the weight to; None where the weight is unpacked to float32."""
        return None

    def fixed_dtype(self, module: nn.Module) -> torch.dtype | None:
        """The one dtype that the layer takes, of inputs or of a bias: nothing around it may be cast. None where it takes any."""
        return None

    def unpacked(self, module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the layer's own kernels unpack it, (out, in), in ``dtype`` (None: as the kernels choose)."""
        raise NotImplementedError

    def exact(self, module: nn.Module, out: Tensor | None = None) -> Tensor:
        """The weight in float64, (out, in), as its format says; in ``out`` where that is passed. Default: the oracle's."""
        from kbitcheck_reference import dequantized_weight

        weight = dequantized_weight(module)
        return weight if out is None else out.copy_(weight)

    def rounds_input(self, module: nn.Module) -> bool:
        """Whether some kernel of the layer rounds its input."""
        return False

    def input_ulp(self, module: nn.Module) -> float:
        """The relative distance of the numbers that an input is rounded to; 0 where the dtype of the product is no finer."""
        return 0.0

    def round_input(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input that the layer really computes with in training."""
        return x

    def adds_bias_apart(self, module: nn.Module) -> bool:
        """Whether the product is rounded before the bias is added to it."""
        return False

    def bias_after_forward(self, module: Any) -> Tensor:
        """The bias as a forward leaves it, of a float32 input."""
        bias: Tensor = module.bias
        return bias

    def biases_after_forward(self, module: Any) -> Sequence[Tensor]:
        """The bias as a forward may leave it, by the dtype of its input."""
        return [self.bias_after_forward(module)]


class Packing:
    """Packed weights without numbers."""

    def quantize_empty(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give each replaced layer of a model on the meta device the weight and state that quantizing would leave.

        ``dtype`` is that of the weights before they are quantized. By default the layers that transformers put in are
        on the meta device already as they will be.
        """

    def as_on_meta(self) -> AbstractContextManager[Any]:
        """The library's functions run on the meta device while the context is open."""
        return nullcontext()

    def while_quantizing(self, module: Any, dtype: torch.dtype) -> int:
        """The most bytes alive on an accelerator while transformers quantizes one layer's weight of this dtype."""
        packed: Tensor = next(module.parameters(recurse=False))
        rows, columns = int(module.out_features), int(module.in_features)
        return rows * columns * dtype.itemsize + packed.nbytes

    def undivided(self, choice: Choice) -> str:
        """Why FSDP2 and ZeRO-3 do not divide packed weights among GPUs; empty where they do."""
        return f"nothing says that packed {choice.scheme} weights can be divided"

    def divisible(self, choice: Choice) -> Mapping[str, str]:
        """The options of a scheme with which packed weights are divided that are not otherwise; empty if there are none."""
        return {}


class Kernels:
    """What a training step saves and allocates where operators run on tensors without numbers (the forecast)."""

    def fake(self, module: nn.Module, real: Mapping[str, Any], tensor: Any) -> None:
        """Give a layer, whose parameters are fakes already, a state of fakes.

        ``real`` holds the parameters that the layer had, by name; ``tensor`` makes the fake of any other tensor.
        """

    def on_device(self, device: str) -> AbstractContextManager[Any]:
        """Calls go to the kernels that the library takes on ``device`` while the context is open."""
        return nullcontext()

    def operator(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """The call that stands in for one of the library's operators where its answer depends on numbers."""
        return func, args, kwargs


class Backend:
    """One quantizer. The parts may import torch; this class may not, before a part is asked for."""

    name: ClassVar[str] = ""
    schemes: ClassVar[Sequence[Scheme]] = ()
    # Modules whose import comes before any layer of this backend; where there are none, torch's does.
    libraries: ClassVar[Sequence[str]] = ("torch",)
    # Classes of layers that are quantized on load.
    replaces: ClassVar[Sequence[str]] = ("Linear",)
    # What the number of rows of a weight, the layer's outputs, must be a multiple of; other layers stay as they are.
    rows: ClassVar[int] = 1
    # transformers' own word for the method in ``quantization_config``.
    method: ClassVar[str] = ""
    # The names of tensors in a checkpoint that unpack another one, whose name, with or without its last ".weight", is the group ``weight``.
    stored_state: ClassVar[str] = ""
    # Why checkpoints of this backend get the static audit alone; empty where they are loaded and run.
    static_only: ClassVar[str] = ""
    # Whether preparations promise float32 around its layers: if not, casting what is there and leaving it are both right.
    promises_upcast: ClassVar[bool] = False
    # What turns all of a model's packed weights into plain numbers for good, however it was loaded; empty where nothing does.
    unpacked_by: ClassVar[str] = ""

    @property
    def recognition(self) -> Recognition:
        return Recognition()

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic()

    @property
    def packing(self) -> Packing:
        return Packing()

    @property
    def kernels(self) -> Kernels:
        return Kernels()

    def unavailable(self) -> str:
        """Why nothing of this backend runs here (package, device, compute capability); empty where it does."""
        return ""

    def not_on_load(self) -> str:
        """Why no model can be quantized so on load and run here; empty where one can. Default: as checkpoints."""
        return self.static_only

    def scheme(self, name: str) -> Scheme:
        """The scheme of that name."""
        return next(scheme for scheme in self.schemes if scheme.name == name)

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's ``quantization_config`` (the JSON object) is this backend's."""
        return bool(self.method) and config.get("quant_method") == self.method

    def described(self, config: Mapping[str, Any]) -> tuple[str, Mapping[str, object], Sequence[str]]:
        """Scheme, option values and skipped modules of a ``quantization_config`` that this backend ``describes``.

        Raises:
            UsageError: a scheme that this backend does not know.
        """
        return self.schemes[0].name, {}, ()

    def config(self, choice: Choice, skip: Sequence[str] | None) -> Any:
        """The transformers configuration that quantizes so on load; ``skip`` names the modules that stay.

        None where transformers cannot: ``quantize`` is then called on the loaded model.
        """
        return None

    def quantize(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        """Quantize a loaded model in place, also one on the meta device; the modules named in ``skip`` stay.

        Raises:
            UsageError: there is no way to quantize so on load; checkpoints that are quantized already are.
        """
        raise UsageError(f"{choice} cannot be quantized on load: give a checkpoint that is quantized already")

    def complete(self, model: nn.Module, choice: Choice, skip: Sequence[str]) -> None:
        """Quantize, in place, what transformers' own quantizer leaves and ``choice`` asks for; also on the meta device."""

    def lay_out(self, model: nn.Module, config: Mapping[str, Any], skip: Sequence[str]) -> None:
        """Give a model on the meta device the packed tensors of a checkpoint with this ``quantization_config``.

        ``skip`` are the modules that transformers leaves out of its own accord. Called where the backend is ``static_only``.
        """
        raise NotImplementedError

    def unpack(self, model: nn.Module) -> None:
        """Turn a model that ``lay_out`` made, in place, into what trains; called where something unpacks it (``unpacked_by``)."""

    def steady(self, model: nn.Module) -> None:
        """Switch off, in place, what would make a layer's weight or arithmetic depend on the machine or on earlier calls."""

    def unsteady(self, model: nn.Module) -> str:
        """What ``steady`` switches off that would change a training with evaluations on this machine, with the way round it; "" if nothing."""
        return ""

    def release(self, model: nn.Module) -> None:
        """Undo ``steady``, in place; called where the model is ``unsteady``."""

    def optimizers(self) -> Sequence[type]:
        """The optimizers that the library brings, each of which takes parameters and ``lr``."""
        return ()

    def warnings(self) -> Mapping[str, str]:
        """What the library warns of and is wrong or costs: by a regular expression of the beginning, what it is about."""
        return {}

    def findings(self) -> Sequence[Finding]:
        """Deviations of the library itself that are documented: those of a ``findings.toml`` beside the class's file."""
        own = getattr(sys.modules[type(self).__module__], "__file__", None)
        file = Path(own).with_name("findings.toml") if own else None
        return read_findings(file) if file and file.exists() else ()
