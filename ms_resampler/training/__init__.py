"""Training: conversation data, recipes, runs, and estimates of memory and time."""
