"""Training in this very process."""


class Local:
    """No other process: `scatterfold train` trains here, or as the rank that a launcher made of it."""
