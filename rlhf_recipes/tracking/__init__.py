"""Record runs and models in MLflow, send records later, and load models back."""
