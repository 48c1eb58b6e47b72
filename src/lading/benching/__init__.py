"""`lading bench`: a load timed beside other loaders and this machine's ceilings."""
