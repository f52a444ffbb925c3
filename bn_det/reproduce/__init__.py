"""The paper's experiments, run by one command and reported: see bn-det reproduce."""
