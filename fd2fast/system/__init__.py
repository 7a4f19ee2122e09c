"""What surrounds the work: processes, threads, devices, memory, files of others, streams, locks, failures."""
