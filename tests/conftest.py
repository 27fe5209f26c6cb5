"""What pytest needs to know: where the scripts lie, what `slow` means, and one miniature run of the
whole chain, which all files of tests share."""

import os
import signal
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # tests run from anywhere
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # small tensors: one is faster


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs only if -m names it (-m slow, or "
                                       "-m 'slow or not slow' for all tests)")
    # A job in the background ignores Ctrl-C, and its children would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Leave the slow tests out unless -m says something about them."""
    if "slow" in config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The run folder after the whole chain; tests copy what they need from it and leave it as it
    is."""
    from chain import OPTIONS, STAGES, prepare_options, succeed
    out_dir = tmp_path_factory.mktemp("chain") / "out"
    succeed("prepare", out_dir, *prepare_options(out_dir))
    for stage in STAGES:
        succeed(stage, out_dir, *OPTIONS[stage])
    succeed("sample", out_dir, "--compare")
    return out_dir
