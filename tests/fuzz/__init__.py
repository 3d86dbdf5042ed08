"""Random models, loops and events against averages in float64: ``python -m tests.fuzz --help``."""
