"""Measurements: `python -m bench` (CPU), `bench.gpu`, `bench.aot`, `bench.plot`. No package imports this."""
