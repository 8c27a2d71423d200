"""Statistics of single gradients beside other libraries: jax_privacy, Opacus, BackPACK."""

import functools

import jax
import numpy as np
import pytest

import fnbp
from experiments.shared.timing import distance
from experiments.statistics_cost import in_torch, nets, peers

NETS = {
    "mlp": nets.Net(fnbp.models.mlp(7, 11, 10), nets.labelled(13), 5),
    "lenet": nets.NETS["lenet"]._replace(m=3),
}
# what these libraries warn of in themselves is not ours
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [None, 1])
@pytest.mark.parametrize("name", NETS)
def test_clipped_gradients_are_those_of_jax_privacy(x64, name, microbatch):
    pytest.importorskip("jax_privacy")
    case = nets.case_of(NETS[name], 0, float)
    ours = jax.jit(peers.ours("clipped", case))(*case.args)
    assert distance(ours, jax.jit(peers.privately(case, microbatch))(*case.args)) <= 1e-10


@functools.cache
def computed(name):
    """A case in float32, and what the libraries of PyTorch make of it."""
    case = nets.case_of(NETS[name], 0)
    return case, in_torch.functions(peers.problem_of(name, case))


@pytest.mark.slow
@pytest.mark.parametrize("statistic, peer", [(one, peer) for one, some in in_torch.PEERS.items() for peer in some])
@pytest.mark.parametrize("name", NETS)
def test_statistics_are_those_of_the_libraries_of_pytorch(name, statistic, peer):
    for package in ("torch", in_torch.NEEDS[peer]):
        pytest.importorskip(package)
    case, known = computed(name)
    ours = jax.jit(peers.ours(statistic, case))(*case.args)
    theirs = peers.of_torch(case, known[statistic, peer][1]())
    assert distance(peers.comparable(statistic, ours), peers.comparable(statistic, theirs)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_factors_of_k_fac_are_those_of_kfac_jax(name):
    pytest.importorskip("kfac_jax")
    case = nets.case_of(NETS[name], 0)
    value, _, factors = jax.jit(peers.ours("kfac beside", case))(*case.args)
    due, _, blocks = jax.jit(peers.by_kfac_jax(case, "fisher_empirical"))(*case.args)
    np.testing.assert_allclose(value, due, rtol=1e-5)
    held = [layer["W"] for layer in factors if layer]
    assert len(held) == len(blocks)
    for i, ((A, G), (their_A, their_G)) in enumerate(zip(held, blocks, strict=True)):
        n, m = len(A), len(case.args[2])
        if name == "mlp" or i > 2:  # that of LeNet flattens alike, but its channels come first in a window
            assert distance(A, their_A[:n, :n]) <= 1e-5
        positions = {0: 784, 1: 100}.get(i, 1) if name == "lenet" else 1
        assert distance(G, their_G * m * positions) <= 1e-5
