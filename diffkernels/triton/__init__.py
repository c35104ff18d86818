"""Triton kernels: the same names and the same calling convention as the native ones. Imported only when one runs."""
