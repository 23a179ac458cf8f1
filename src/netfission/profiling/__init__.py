"""What a network costs: parameters and multiply-accumulates counted, time and memory measured."""
