"""One module per command: parse, call one function of another room, show the result."""
