"""From the name that a user gives to a checkpoint or to rows of data."""
