"""Helpers that every package may use: errors, files, typed content, text, modules' modes, the hub."""
