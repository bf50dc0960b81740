"""Everything that scores a completion, and how it is called safely."""
