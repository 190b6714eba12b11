"""Readers of other people's files; nothing that a file brings is executed."""
