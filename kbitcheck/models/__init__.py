"""Where models come from, and what they are fed."""
