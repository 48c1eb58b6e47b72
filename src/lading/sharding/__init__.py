"""The verbs `shard`, `reshard_files` and `merge`: from files to files."""
