"""Float twins: a base with its quantized weights unpacked."""
