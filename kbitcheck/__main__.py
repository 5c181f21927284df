"""``python -m kbitcheck``."""

from kbitcheck.door import main

main()
