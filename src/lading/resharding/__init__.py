"""The verb `reshard`: from one live model into another."""
