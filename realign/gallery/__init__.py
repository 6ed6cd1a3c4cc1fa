"""Static pages to look at a run: no server, no script, nothing loaded from elsewhere."""
