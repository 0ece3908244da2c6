"""The command line: Lightning's commands and this package's own."""
