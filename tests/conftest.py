import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
if "TRITON_INTERPRET" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # decided when triton.language is imported: before any test module

import pytest


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the long tier: every case in every dtype on every backend")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs only in the long tier (--all)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        deselected = [i for i in items if i.get_closest_marker("long")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [i for i in items if not i.get_closest_marker("long")]
