"""When influence is to be trusted: the limits that results and reports name. It imports nothing."""

MISS = 0.5
"""Share of the real changes that the scores may miss in the trial."""
SMOOTH = 0.5
"""Metasmoothness below which derivatives by weights say little about real deletions."""
