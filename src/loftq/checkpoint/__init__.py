"""Making, checking and describing a LoftQ checkpoint, shard by shard."""
