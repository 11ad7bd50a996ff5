"""The command line: a skin over the library, one file a command."""
