"""Networks as plain modules: the denoisers D that wrap them and the student's s-branch."""
