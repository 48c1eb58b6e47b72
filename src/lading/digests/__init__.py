"""Digests of tensors that do not depend on how they are cut."""
