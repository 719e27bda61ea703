"""Resources and predicted times of the kernels on GPUs that are not here."""
