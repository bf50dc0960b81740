"""The small world of the quickstart, whose true score is known."""
