"""How long a job of one rank takes to start, on a machine that has its kernels and on one that has none."""
