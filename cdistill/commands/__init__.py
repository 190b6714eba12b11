"""What each command does, as plain typed functions that put the rooms below together."""
