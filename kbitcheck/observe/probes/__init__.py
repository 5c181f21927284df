"""The only place that touches tensors: each probe turns a model, or a run of it, into plain facts."""
