"""One file per question. Each has `measure(lab)`, which yields rows as they are known."""
