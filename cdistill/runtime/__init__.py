"""Processes, threads, signals, random numbers, and the terminal."""
