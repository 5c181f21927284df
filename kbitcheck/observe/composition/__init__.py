"""A prepared model in several processes, in a trainer, compiled, copied or resumed: each case in fresh processes."""
