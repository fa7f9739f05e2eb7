"""The optimiser of the bundled models, against torch's own and against singular values."""

from __future__ import annotations

import pytest
import torch

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.sticker.build.loop import LoopConfig, Trainer
from t2i_spo_plugin.sticker.build.muon import Muon, orthogonalised, suits


@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (32, 32)])
def test_an_update_has_singular_values_near_one_in_the_gradients_own_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)

    inner = left.T @ orthogonalised(matrix) @ right.T

    assert 0.5 < inner.diagonal().min() and inner.diagonal().max() < 1.3
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(24, 80), (80, 24)])
def test_matrices_are_updated_as_torch_does_it(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=rng)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    one = Muon([ours], **options)
    two = torch.optim.Muon([theirs], **options, adjust_lr_fn="original")
    for _ in range(4):
        gradient = torch.randn(shape, generator=rng)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        two.step()

    # Theirs iterates in bfloat16.
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved
    assert (ours - start).norm() > 0.5 * moved


def test_a_convolution_counts_as_a_matrix_whatever_its_memory_format() -> None:
    rng = torch.Generator().manual_seed(2)
    start, gradient = torch.randn(24, 20, 3, 3, generator=rng), torch.randn(24, 20, 3, 3, generator=rng)
    flat, plain = torch.nn.Parameter(start.flatten(1).clone()), torch.nn.Parameter(start.clone())
    last = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
    flat.grad, plain.grad = gradient.flatten(1).clone(), gradient.clone()
    last.grad = gradient.clone(memory_format=torch.channels_last)

    for weight in (flat, plain, last):
        Muon([weight]).step()

    torch.testing.assert_close(plain.flatten(1), flat)
    torch.testing.assert_close(last, plain)
    assert suits(plain) and not suits(torch.zeros(24)) and not suits(torch.zeros(3, 20, 3, 3))


def test_a_run_that_stops_goes_on_as_if_it_had_not(tmp_path) -> None:
    class Stop(Exception):
        pass

    def trained(folder, stop: int) -> dict[str, torch.Tensor]:
        while True:
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 20))
            config = LoopConfig(8, 1e-3, warmup=1, ema=0.9, muon=0.02, checkpoint_every=2)
            trainer = Trainer(folder, {"net": net}, config)
            resumed = trainer.state.step

            def step(n: int, net=net, resumed=resumed) -> torch.Tensor:
                if n == stop and not resumed:
                    raise Stop
                x = torch.randn(16, 24, generator=torch.Generator().manual_seed(n))
                return (net(x) - x[:, :20]).square().mean()

            try:
                trainer.run(step)
            except Stop:
                continue
            return trainer.averaged("net") | {f"raw {k}": v for k, v in net.state_dict().items()}

    unbroken, broken = trained(tmp_path / "a", -1), trained(tmp_path / "b", 5)
    torch.testing.assert_close(unbroken, broken, rtol=0, atol=0)


def test_a_loss_that_is_no_number_ends_the_run_with_the_checkpoint_before(tmp_path) -> None:
    net = torch.nn.Linear(20, 20)
    trainer = Trainer(tmp_path, {"net": net}, LoopConfig(100, 1e-3, checkpoint_every=50))

    def step(n: int) -> torch.Tensor:
        return net(torch.ones(1, 20)).mean() * (float("nan") if n == 70 else 1.0)

    with pytest.raises(SPOError, match="step 100; a lower rate"):
        trainer.run(step)
    assert Trainer(tmp_path, {"net": net}, trainer.config).state.step == 50
    assert all(w.isfinite().all() for w in net.parameters())
