"""Takes kernel memory that no process holds: System V semaphores and message queues."""

import ctypes

libc = ctypes.CDLL(None, use_errno=True)
taken = []
if libc.semget(0, 1000, 0o1600) >= 0:
    taken.append("semaphores")
if libc.msgget(0, 0o1600) >= 0:
    taken.append("messages")
print("taken", taken)
