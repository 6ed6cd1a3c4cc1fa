"""What is read and written before a picture: reasoning formats, their prompts, turn-taking programs."""
