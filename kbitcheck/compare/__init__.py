"""Two runs or more: ledger, gate, diff, matrix."""
