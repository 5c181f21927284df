"""What ``kbitcheck watch`` puts on the path of a command."""
