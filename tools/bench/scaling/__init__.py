"""`scatterfold bench scaling`: time, memory and traffic of a training step, layout by layout."""
