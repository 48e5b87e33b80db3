"""Plain NumPy that reads like the formulas: the oracle that every kernel is tested against."""
