"""Training: one loop for every task, the tasks (teacher, CTM, CM), and their exact state."""
