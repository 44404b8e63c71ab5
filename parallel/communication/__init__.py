"""What groups of ranks send each other, how long they wait, and who is named when one stands still."""
