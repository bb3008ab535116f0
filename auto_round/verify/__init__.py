"""Checks of what was written, by readers that share no code with the writers."""
