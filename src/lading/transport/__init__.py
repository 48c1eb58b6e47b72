"""From the bytes of a checkpoint into parameters."""

from lading.transport.cuda import release_pinned
from lading.transport.engine import Stats
from lading.transport.host import DEFAULT_STAGING_BYTES, HostTransport, Moved
from lading.transport.moving import Limits, Transport, gpus_for

__all__ = [
    "DEFAULT_STAGING_BYTES",
    "HostTransport",
    "Limits",
    "Moved",
    "Stats",
    "Transport",
    "gpus_for",
    "release_pinned",
]
