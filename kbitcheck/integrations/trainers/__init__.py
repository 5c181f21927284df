"""What trainers do to a quantized model before they train it, each taken from the trainer itself, as functions that ``--prepare`` calls."""
