"""A mistake on the command line."""


class UsageError(ValueError):
    """A mistake that the command reports in one line."""
