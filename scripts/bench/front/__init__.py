"""What the front door costs. Needs no GPU."""
