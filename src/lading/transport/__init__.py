"""From the bytes of a checkpoint into parameters."""

from lading.transport.host import DEFAULT_STAGING_BYTES, HostTransport, Moved

__all__ = ["DEFAULT_STAGING_BYTES", "HostTransport", "Moved"]
