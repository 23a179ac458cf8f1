"""Training: settings, the Lightning module, and a run from settings to a folder."""
