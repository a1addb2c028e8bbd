"""Training: scenes and conversations as data, recipes, and the run itself."""
