"""BAGEL, architecture only: config, decoder, ViT, autoencoder, weights."""
