"""MLflow: written now, delivered later, fetched back."""
