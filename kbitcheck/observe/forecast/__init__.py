"""The audit that reads and makes no weights: sizes from the meta device, activations from tensors without numbers."""
