"""Read several runs from MLflow, and rank them on one page."""
