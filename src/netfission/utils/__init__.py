"""What any package here may use: reading and writing, text, modes of modules."""
