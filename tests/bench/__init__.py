"""Speed beside other implementations, on this machine, now: `python -m tests.bench` (`make bench`).

All contestants run the same weights in one process, in interleaved rounds, so that what slows the
machine slows them all; ratios of medians are the result, tokens per second only their illustration.
Start-up is measured on fresh processes.
"""
