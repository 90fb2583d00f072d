"""The command line: one file a command, wiring and printing only."""
