"""Is the policy better than before? Win rates, samples, alarms."""
