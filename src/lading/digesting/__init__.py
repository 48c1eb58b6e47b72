"""The verb `digest`, of folders and of live models (not named so: `lading.digest` is the function)."""
