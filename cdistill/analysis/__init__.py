"""What can be known before training: the score of a preconditioning, and the cost of a recipe."""
