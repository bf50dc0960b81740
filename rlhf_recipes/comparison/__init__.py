"""Several runs, read back and ranked on one page."""
