"""The verb `digest`, of folders and of live models (`lading.digest` is the function)."""
