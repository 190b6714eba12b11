"""Analysis before training: `consistency_gap` (what preconditionings are worth), `cost` (what a recipe will cost)."""
