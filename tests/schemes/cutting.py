"""LOST: the helper of test_compressed_tensors.py stood here and was overwritten by accident.

At 22:03:49 the author of test_gptq.py wrote a file of the same name over it, half a minute after it
was made. It could not be recovered; please write it again (check_cuts, fixture, found_of, modules,
pieces, whole). Nothing else uses this file: the GPTQ, AWQ and Marlin tests use stored_modules.py.
"""

raise ImportError(__doc__)
