"""How good scores are: deletion curves, recovery, soft metrics, tables and comparisons."""
