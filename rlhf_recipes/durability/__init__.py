"""A checkpoint is whole or not there; a run stops at a signal and resumes."""
