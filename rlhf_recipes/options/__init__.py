"""What a user may set, and which of it matters for what."""
