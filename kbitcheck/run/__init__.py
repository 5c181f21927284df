"""Which process does what: runner, pool, worker, environments, sweep."""
