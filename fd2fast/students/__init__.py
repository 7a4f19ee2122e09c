"""Students, and the real images that methods are compared with."""
