"""Which layers hold GPTQ weights: GPTQModel's own layer of plain torch, and those of a checkpoint that is laid out and not run."""

from collections.abc import Mapping
from typing import Any

from kbitcheck.backends.buffered import BufferedLayers


class GptqLayers(BufferedLayers):
    """A layer says which version of the format its zeros have."""

    cls = "gptqmodel.nn_modules.qlinear.torch.TorchLinear"
    prefix = "gptq-int"
    tensors = ("qzeros", "scales", "g_idx")

    def plain(self, module: Any) -> Mapping[str, Any]:
        return {**super().plain(module), "version": module.qzero_format()}
