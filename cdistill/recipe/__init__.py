"""Recipes: TOML files, checked whole before anything runs."""
