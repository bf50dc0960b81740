"""Measure whether the policy is better than before: win rates, samples, alarms."""
