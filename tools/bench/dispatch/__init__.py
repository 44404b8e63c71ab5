"""`scatterfold bench dispatch`: what token dispatch sends, and how long a layer takes."""
