"""What runs in the child processes: pipo, its peers, and a reader of the bare drive."""
