"""One file a subcommand: its ``Options`` and ``run(options)``, which returns the exit code."""
