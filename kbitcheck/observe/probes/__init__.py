"""Probes: each turns a model, or a run of it, into plain facts."""
