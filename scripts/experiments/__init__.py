"""Experiments: each builds its network, runs, and leaves a result folder."""
