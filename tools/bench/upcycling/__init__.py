"""`scatterfold bench upcycling`: does upcycling pay, at equal extra training FLOPs?"""
