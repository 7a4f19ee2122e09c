"""Stand-ins for the published scripts: the same flags, folders, files and lines, on this engine.

`python -m fd2fast.dropin.recover_FD2` and its neighbours, each in a file with the table of its flags.
"""
