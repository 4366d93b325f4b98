"""Predictions: draws in chunks, running statistics and batch norm."""
