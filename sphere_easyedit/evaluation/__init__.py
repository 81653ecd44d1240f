"""Metrics of an edited model, by protocol."""
