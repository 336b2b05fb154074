"""Compilers and child processes that tests wait for work on one core while the other tests run on another.

The mark `@job(f, *arguments)` starts f(*arguments) when the session starts and puts the test behind all others; there
`result(f, *arguments)` is what it returned. f is a functools.cache: what several tests share is done once.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

_pool, _started = ThreadPoolExecutor(1), {}

job = pytest.mark.job.with_args


def of(item):
    return [marker.args for marker in item.iter_markers("job")]


def start(items):
    for job, *arguments in (args for item in items for args in of(item)):
        if (job, *arguments) not in _started:
            _started[job, *arguments] = _pool.submit(job, *arguments)


def result(job, *arguments):
    """Waits where the job has begun; does it here and now where it has not."""
    future = _started.get((job, *arguments))
    return job(*arguments) if future is None or future.cancel() else future.result()


def stop():
    _pool.shutdown(cancel_futures=True)
