"""One module per op: how its cases are built. Each holds `OPS`, which `bench.registry` collects."""
