"""What the scripts of perf/ are made of."""
