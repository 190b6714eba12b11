"""What a student is trained to satisfy: losses, distances, and their cost in network calls."""
