"""The command `realign`: a module for each subcommand, imported when it is called."""
