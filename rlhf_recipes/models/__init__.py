"""Safe loading of networks, one forward for log-probabilities and values, and the attached value head."""
