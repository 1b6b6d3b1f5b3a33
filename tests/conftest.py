"""The tests read no hub: what they need is in the package or made by them.

Threads wait asleep: where several programs share the machine, spinning ones would take the time that the others need.
"""
import os, signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# a shell starts what it leaves in the background deaf to Ctrl-C, and children inherit that; some tests press it
signal.signal(signal.SIGINT, signal.default_int_handler)
