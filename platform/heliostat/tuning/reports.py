"""Keys of what a trial reports, for trials and for who follows them. Imports nothing: trials should start quickly."""

FINISHED = "finished"
"""The trial came to its own end."""
ERROR = "error"
"""Why it failed, in a way that no restart would mend."""
