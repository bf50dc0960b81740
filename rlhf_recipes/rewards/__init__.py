"""Everything that scores a completion, and safe calls of it."""
