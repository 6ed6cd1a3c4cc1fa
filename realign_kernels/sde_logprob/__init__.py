"""Log-prob of a stored sampler step under a new velocity."""
