"""From a case to facts: the only layer that touches tensors, beside the backends."""
