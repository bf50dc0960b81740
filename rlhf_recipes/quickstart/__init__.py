"""Two small worlds of text whose true score is known."""
