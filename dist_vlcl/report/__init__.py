"""Tables and figures from what a run has written."""
