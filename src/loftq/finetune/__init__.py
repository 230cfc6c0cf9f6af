"""The fine-tuning harness: recipes, tasks, runs and comparisons. Nothing below it imports it."""
