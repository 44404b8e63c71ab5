"""`scatterfold bench kernels`: what is measured (shapes, cases, entries), how, and what is made of it."""
