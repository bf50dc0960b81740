"""Rows, prompts, and the boundary between prompt and response."""
