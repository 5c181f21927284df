"""Where models come from, and what they are fed. Whatever is wrong with a model is a ``UsageError``."""
