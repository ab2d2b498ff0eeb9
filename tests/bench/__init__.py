"""Speed beside other implementations, on this machine, now: `python -m tests.bench` (`make bench`).

All contestants run the same weights, in interleaved rounds, so that what slows the machine slows
them all; ratios of medians are the result, tokens per second only their illustration.  Each rival
has a process of its own, which sleeps while others are measured (see `worker.py`).
Start-up is measured on fresh processes.
"""
