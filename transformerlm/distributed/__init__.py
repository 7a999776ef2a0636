"""More than one process: the ranks of a training run, and workers that share out a list of parts."""
