"""Networks loaded safely; one forward for log-probabilities and values; the value head attached."""
