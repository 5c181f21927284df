"""Looks at the training steps of a user's own script, and leaves every bit of them as it is."""
