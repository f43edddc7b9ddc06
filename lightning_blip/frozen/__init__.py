"""What is frozen: the state of each parameter or layer, and of the whole network."""
