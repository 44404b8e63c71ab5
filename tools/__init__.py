"""Commands that a person types: they read a configuration, call the floors below and print."""
