"""The procedural world: scenes, pictures, instructions, and an oracle that judges the answers."""
