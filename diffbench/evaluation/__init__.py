"""Evaluation: feature extractors and distances."""
