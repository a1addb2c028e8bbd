"""Training: data of conversations, recipes, runs, and what a run will take."""
