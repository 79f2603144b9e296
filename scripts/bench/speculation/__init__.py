"""How many of the shipped model's drafts are right, by domain."""
