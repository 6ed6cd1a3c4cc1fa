"""One step of a sampler: `a * x + b * v + std * noise`, per-sample numbers."""
