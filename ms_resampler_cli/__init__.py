"""The command line of MS-Resampler, which starts without its package: see main.py."""
