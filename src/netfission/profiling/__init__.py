"""What a network costs: multiply-accumulates counted, time and memory measured."""
