"""How fast the model runs and how far that is from what the machine could do: `python -m benchmarks --help`."""
