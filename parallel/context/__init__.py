"""Context parallelism: each rank holds a part of every sequence, and queries meet the keys of all ranks."""
