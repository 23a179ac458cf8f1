"""What is done to a module: cut into stages, masked, narrowed, and its coupled channels found."""
