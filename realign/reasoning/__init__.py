"""What is read and written before a picture: the reasoning formats, their prompts, and the programs that take turns."""
