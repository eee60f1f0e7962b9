"""Runs: the aipaging command line, experiments, analysis and reports."""
