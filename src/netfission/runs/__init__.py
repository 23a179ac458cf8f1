"""Runs: from settings to the folder of a trained, evaluated network."""
