"""Ways from one network to several predictions: fission, and what a user would pick instead."""
