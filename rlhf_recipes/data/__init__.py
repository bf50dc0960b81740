"""Load rows and prompts, and set the boundary between prompt and response."""
