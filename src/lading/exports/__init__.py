"""The verb `export`: a live model back into a Hugging Face checkpoint."""
