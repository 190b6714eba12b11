"""Training: one loop for every task, the two tasks (a teacher, a student of any objective), and their exact state."""
