"""The paper's experiments, run by one command and reported: see tools/reproduce.py."""
