"""The run of a plan: which segments share a step, what they begin with, how much fits, and the steps by all processes."""
