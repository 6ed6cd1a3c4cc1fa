"""Text and image guidance of velocities, with per-sample renorm."""
