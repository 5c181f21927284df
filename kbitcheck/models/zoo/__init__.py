"""Architectures, shrunk."""
