"""The command line: options, help, and the printing of results."""
