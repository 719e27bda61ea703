"""What the kernels need on GPUs that are not here, and how long they may take there."""
