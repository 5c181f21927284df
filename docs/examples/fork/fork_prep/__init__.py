"""A fork of the reference preparation."""

from kbitcheck_reference import prepare_model_for_kbit_training as reference


def prepare(model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=None):
    """Prepare a quantized model for training, and say how many parameters it has."""
    model = reference(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
    model.prepared_parameters = sum(1 for _ in model.parameters())
    return model
