"""Which layers hold AWQ weights: GPTQModel's own layer of plain torch, and those of a checkpoint that is laid out and not run."""

from kbitcheck.backends.buffered import BufferedLayers


class AwqLayers(BufferedLayers):
    """Codes, zeros and scales."""

    cls = "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear"
    prefix = "awq-int"
    tensors = ("qzeros", "scales")
