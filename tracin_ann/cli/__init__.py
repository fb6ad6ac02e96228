"""The commands: parse into one config, call one function, print."""
