"""The command line: one file a group of commands, and `main`, which finds them."""
