"""The version of this package, as reports and ledgers record it."""

VERSION = "0.1.0"
TOOL = f"kbitcheck {VERSION}"
