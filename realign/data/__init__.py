"""Samples in: prompt files, pictures, and (for training) packed batches. Imports no other part of realign."""
