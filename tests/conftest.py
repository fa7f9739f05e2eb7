"""Settings for all tests: no network, one thread (nets this small are slower on two), and the tiny pipelines."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(params=["sd1", "sdxl", "sd3", "flux"])
def family(request):
    """One of the four families; a test that takes it runs on each."""
    return request.param


@pytest.fixture
def pipe(family):
    """A tiny pipeline of `family` of the test's own."""
    from support.pipelines import fresh

    return fresh(family)


@pytest.fixture
def sd1():
    """A tiny Stable Diffusion pipeline of the test's own."""
    from support.pipelines import fresh

    return fresh("sd1")
