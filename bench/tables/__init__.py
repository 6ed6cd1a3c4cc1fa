"""The README's tables, made from the rows in `bench/results`."""
