"""Benchmarks: cases come with the ops' declarations, peers and the method are here."""
