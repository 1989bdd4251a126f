"""Threads for the tiny model on a machine that others use too; loads nothing, so that it can run before torch does."""

import os

MOST = 4  # a model of a million parameters has no work for more


def bound_threads() -> str:
    """Set OMP_NUM_THREADS to the cores that are free, at least 1 and at most `MOST`, unless it is set; says what it is.

    Threads wait for each other in a busy loop. On two cores with a load of 13, a step of the cold start took 7 s with
    two threads, and 0.2 s with one.
    """
    if given := os.environ.get("OMP_NUM_THREADS"):
        return f"threads: {given}, by OMP_NUM_THREADS"
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    threads = max(1, min(allowed, cores - round(load), MOST))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return f"threads: {threads} ({cores} cores, load {load:.1f}; OMP_NUM_THREADS sets another number)"
