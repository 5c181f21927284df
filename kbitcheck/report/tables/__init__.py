"""Tables over many reports."""
