"""Serve a trained network over HTTP: a page, predictions as JSON, health and metrics."""
