"""Looks at the training steps of a user's own script, and leaves every bit of them as it is."""

# An attribute of a model's modules while the model is lent to kbitcheck: the steps that are taken then are not its owner's.
LENT = "_lent_to_kbitcheck"
