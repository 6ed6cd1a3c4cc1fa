"""Programs that train: the supervised trainer, and what makes mini's starting point."""
