"""Recipes and targets as validated data, and the data files of this package."""
