"""An iteration of alignment end to end, beside the same one done as the reference trainers do it."""
