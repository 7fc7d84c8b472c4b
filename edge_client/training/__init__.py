"""What every backend follows: the recipe, the plan of steps, and the snapshot to resume from."""
