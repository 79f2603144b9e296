"""What the prefix cache saves in talks, and what it costs where nothing is shared."""
