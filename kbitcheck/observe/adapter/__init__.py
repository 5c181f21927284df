"""A saved adapter: what its files hold, beside the structure of its base."""
