"""Files from strangers: what is promised about them in SECURITY.md."""
