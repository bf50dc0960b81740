"""What a run will do and need, printed before it starts."""
