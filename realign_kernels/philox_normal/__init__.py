"""Standard normals that are a function of what they are for."""
