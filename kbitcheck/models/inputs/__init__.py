"""Training batches for any kind of model."""
