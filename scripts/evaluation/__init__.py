"""What sparse settings keep of a model's quality, and what block selection keeps of attention."""
