"""The oracle that goes block by block."""
