"""The command ``kbitcheck``: parse, run, render."""
