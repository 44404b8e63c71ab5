"""What is measured: our backends, the dense limits, and the peers, each in its own way of being called."""

from .registry import Entry, all_entries, chosen_entries

__all__ = ["Entry", "all_entries", "chosen_entries"]
