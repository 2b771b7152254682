"""The model as every method sees it."""
