"""Pruning at initialisation: one criterion a file, one exact selection for all."""
