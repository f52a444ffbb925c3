"""The commands of ``bn-det``: a file for each."""
