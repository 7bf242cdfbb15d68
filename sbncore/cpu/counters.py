"""What the tasks of a call's phases are claimed by, and counted when they are done: a cache line for each."""

FIRST, DONE, SECOND, FINISHED, THIRD, WRITTEN, LAST = range(0, 56, 8)
SIZE = 56
