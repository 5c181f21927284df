"""A case in a process of its own in which nothing names the package."""
