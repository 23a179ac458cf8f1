"""Comparisons: grids of runs under one recipe, their records, and the tables and pictures drawn from them."""
