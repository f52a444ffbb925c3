"""The experiments: what each runs, what it shows, and what its claims are measured by."""
