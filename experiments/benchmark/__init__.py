"""What an adapter costs: `python -m experiments.benchmark`."""
