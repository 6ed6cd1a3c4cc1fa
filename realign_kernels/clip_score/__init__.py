"""Cosines of picture and text embeddings, of pairs or of all with all."""
