"""Pods of the original DRSM, the real Go module, beside SDK pods on one collection."""
