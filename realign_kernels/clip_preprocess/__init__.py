"""Pictures of different sizes to the input of a CLIP tower, as Pillow and open_clip make it, bit for bit."""
