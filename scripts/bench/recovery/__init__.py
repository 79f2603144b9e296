"""How long a deployment takes to serve again after a job was killed. Needs no GPU."""
