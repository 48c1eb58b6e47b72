"""Pre-sharded folders as data: their files, their manifest, what they serve. No torch."""
