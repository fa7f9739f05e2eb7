"""One denoiser with one adapter: what it predicts with the adapter on and off, and how often it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .data.batches import Batch
from .families import Conditioning, Family, joined
from .objectives.base import Inputs, Outputs, Predictions
from .objectives.losses import per_sample_error


@dataclass
class Passes:
    """Samples that went through the denoiser in training: the measure of an equal budget."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


class StoredErrors:
    """The reference's errors on a fixed set of draws of each example, computed once.

    Args:
        examples: how many there are, N.
        draws: of each example, K.
        sides: images of each example, S.
    """

    def __init__(self, examples: int, draws: int, sides: int) -> None:
        self.errors = torch.full((examples, draws, sides), float("nan"))

    def get(self, batch: Batch) -> Tensor | None:
        """`[S, B]`, or None if any is not known yet."""
        errors = self.errors[list(batch.examples), list(batch.slots)]
        return None if bool(errors.isnan().any()) else errors.T.to(batch.latents.device)

    def put(self, batch: Batch, errors: Tensor) -> None:
        """Store `errors [S, B]`."""
        self.errors[list(batch.examples), list(batch.slots)] = errors.T.cpu()


class Predictor:
    """Predictions of model and reference, which is the same denoiser with its adapter switched off.

    Args:
        family: with the denoiser.
        model: what the gradient flows through: the denoiser itself or a wrapper of it. Everything without gradient
            goes through the bare denoiser.
        resolution: edge of the images in pixels.
        autocast: makes the context that predictions are made in.
        adapter: the LoRA that is trained.
        reference: another LoRA of the denoiser, which is the reference; None is the denoiser with no adapter.
    """

    def __init__(
        self,
        family: Family,
        model: nn.Module,
        resolution: int,
        autocast: Callable[[], AbstractContextManager[None]],
        adapter: str = "",
        reference: str | None = None,
    ) -> None:
        self.family, self.model, self.resolution, self.autocast = family, model, resolution, autocast
        self.adapter, self.reference = adapter, reference
        self.layers = [layer for layer in family.module.modules() if isinstance(layer, BaseTunerLayer)]
        self.passes = Passes()

    def train(
        self, batch: Batch, extra: Sequence[Inputs] = (), reference: bool = True, stored: StoredErrors | None = None
    ) -> tuple[Predictions, list[Outputs]]:
        """Predictions for the batch and for each of `extra`, the model's with gradient, in one call of the denoiser.

        Args:
            batch: S images of B examples.
            extra: more samples.
            reference: whether the reference is asked too.
            stored: takes the reference's errors from here where they are known, and puts them here where not.
        """
        noisy, index, text = self._joined(batch, extra)
        target = self._target(batch)
        reference_errors = stored.get(batch) if stored is not None else None
        base: Tensor | None = None
        if reference and reference_errors is None:
            with torch.no_grad(), self._adapter_off():
                base = self._predict(self.family.module, noisy, index, text)
            reference_errors = _errors(self._of_batch(base, batch), target, batch.weights)
            if stored is not None:
                stored.put(batch, reference_errors)
        prediction = self._predict(self.model, noisy, index, text)
        self.passes.backward += len(noisy)
        of_model = self._of_batch(prediction, batch)
        of_reference = None if base is None else self._of_batch(base, batch)
        errors = _errors(of_model, target, batch.weights)
        predictions = Predictions(of_model, of_reference, target, errors, reference_errors)
        return predictions, self._of_extra(prediction, base, batch, extra)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Predictions:
        """Predictions of model and reference for the batch, without gradient."""
        noisy, index, text = self._joined(batch, ())
        target = self._target(batch)
        model = self._of_batch(self._predict(self.family.module, noisy, index, text), batch)
        with self._adapter_off():
            base = self._of_batch(self._predict(self.family.module, noisy, index, text), batch)
        weights = batch.weights
        return Predictions(model, base, target, _errors(model, target, weights), _errors(base, target, weights))

    def _joined(self, batch: Batch, extra: Sequence[Inputs]) -> tuple[Tensor, Tensor, Conditioning]:
        """All images of all examples, and more samples, as one batch."""
        sides, index = len(batch.latents), batch.index.flatten()
        latents, noise = batch.latents.flatten(0, 1), batch.noise.flatten(0, 1)
        noisy = self.family.schedule.noised(latents, noise, index)
        text = {name: torch.cat([values] * sides) for name, values in batch.text.items()}
        for more in extra:
            noisy, index = torch.cat((noisy, more.noisy)), torch.cat((index, more.index))
            text = {name: joined((values, more.text[name])) for name, values in text.items()}
        return noisy, index, text

    def _target(self, batch: Batch) -> Tensor:
        latents, noise, index = batch.latents.flatten(0, 1), batch.noise.flatten(0, 1), batch.index.flatten()
        return self.family.schedule.target(latents, noise, index).view_as(batch.latents)

    def _predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning) -> Tensor:
        self.passes.forward += len(noisy)
        with self.autocast():
            return self.family.predict(module, noisy, index, text, self.resolution)

    @staticmethod
    def _of_batch(prediction: Tensor, batch: Batch) -> Tensor:
        count = batch.latents.shape[0] * batch.latents.shape[1]
        return prediction[:count].unflatten(0, batch.latents.shape[:2])

    @staticmethod
    def _of_extra(prediction: Tensor, base: Tensor | None, batch: Batch, extra: Sequence[Inputs]) -> list[Outputs]:
        outputs, start = [], batch.latents.shape[0] * batch.latents.shape[1]
        for more in extra:
            part = slice(start, start + len(more.noisy))
            outputs.append(Outputs(prediction[part], None if base is None else base[part]))
            start = part.stop
        return outputs

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        for layer in self.layers:
            if self.reference is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter(self.reference)
        try:
            yield
        finally:
            for layer in self.layers:
                if self.reference is None:
                    layer.enable_adapters(True)
                else:
                    layer.set_adapter(self.adapter)


def _errors(predictions: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """`[S, B]` of `[S, B, ...]`."""
    return torch.stack([per_sample_error(*side, weights) for side in zip(predictions, target, strict=True)])
