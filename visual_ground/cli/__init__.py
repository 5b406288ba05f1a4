"""The command line: `commands` has one file a command, `shared` what they share, and `main` lists and runs them."""
