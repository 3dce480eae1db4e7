"""What to build and for which machine: recipes and targets as validated data, and the files this package ships."""
