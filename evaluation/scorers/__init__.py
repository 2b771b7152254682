"""Scorers of benchmark answers: pure functions of predictions, without torch."""
