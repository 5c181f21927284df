"""``python -m kbitcheck``."""

from kbitcheck.cli.main import main

main()
