"""``python -m kbitcheck``."""

from kbitcheck.cli import main

main()
