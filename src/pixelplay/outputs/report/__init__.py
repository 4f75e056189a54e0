"""HTML report of a run in one self-contained file."""
