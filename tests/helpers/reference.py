"""The rules once more, from the papers, in numpy's extended precision (64-bit mantissa)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.longdouble]]


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy().astype(np.longdouble)


class Reference:
    """One float64 parameter under one rule.

    Args:
        rule: name of the class in torch.optim.
        param: its value at the start; copied.
        kwargs: the arguments of the rule.
    """

    def __init__(self, rule: str, param: Tensor, **kwargs: Any) -> None:
        self.param = _array(param)
        self._is_decoupled = rule in ("AdamW", "Lion")
        self._rule = getattr(self, f"_{rule.lower()}")
        self._args = kwargs
        self._step, self._product = 0, np.float32(1)
        self._a = np.zeros_like(self.param) + kwargs.get("initial_accumulator_value", 0)
        self._b, self._c = np.zeros_like(self.param), np.zeros_like(self.param)
        if rule == "Rprop":
            self._b += np.longdouble(kwargs["lr"])

    def step(self, grad: Tensor) -> None:
        g = -_array(grad) if self._args.get("maximize") else _array(grad)
        decay = np.longdouble(self._args.get("weight_decay", 0)) * self.param
        decoupled = self._args.get("decoupled_weight_decay", self._is_decoupled)
        self._step += 1
        update = self._rule(g if decoupled else g + decay, **self._args)
        rate = self._args["lr"] / (1 + (self._step - 1) * self._args.get("lr_decay", 0))
        self.param = self.param - update - decoupled * np.longdouble(rate) * decay

    def error(self, param: Tensor) -> float:
        return float(np.abs(_array(param) - self.param).max(initial=0))

    def rms_error(self, param: Tensor) -> float:
        return float(np.sqrt(np.square(_array(param) - self.param).mean()))

    def unit(self) -> float:
        return float(np.finfo(np.float64).eps * np.abs(self.param).max(initial=0))

    def _sgd(
        self, g: Array, lr: float, momentum: float = 0, dampening: float = 0,
        nesterov: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        if momentum == 0:
            return lr * g
        self._a = g if self._step == 1 else momentum * self._a + (1 - dampening) * g
        return lr * (g + momentum * self._a if nesterov else self._a)

    def _adagrad(
        self, g: Array, lr: float, lr_decay: float = 0, eps: float = 1e-10, **_: Any
    ) -> Any:
        self._a = self._a + g * g
        return lr / (1 + (self._step - 1) * lr_decay) * g / (np.sqrt(self._a) + eps)

    def _rmsprop(
        self, g: Array, lr: float, alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0,
        centered: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        self._a = alpha * self._a + (1 - alpha) * g * g
        self._b = alpha * self._b + (1 - alpha) * g
        variance = self._a - self._b**2 if centered else self._a
        self._c = momentum * self._c + g / (np.sqrt(variance) + eps)
        return lr * self._c

    def _adam(
        self, g: Array, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        amsgrad: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        beta1, beta2 = map(np.longdouble, betas)
        self._a = beta1 * self._a + (1 - beta1) * g
        self._b = beta2 * self._b + (1 - beta2) * g * g
        self._c = np.maximum(self._c, self._b) if amsgrad else self._b
        corrected = self._c / (1 - beta2**self._step)
        return lr * self._a / (1 - beta1**self._step) / (np.sqrt(corrected) + eps)

    _adamw = _adam

    def _adamax(
        self, g: Array, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        **_: Any,
    ) -> Any:  # fmt: skip
        beta1, beta2 = map(np.longdouble, betas)
        self._a = beta1 * self._a + (1 - beta1) * g
        self._b = np.maximum(beta2 * self._b, np.abs(g) + eps)
        return lr * self._a / (1 - beta1**self._step) / self._b

    def _nadam(
        self, g: Array, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        momentum_decay: float = 4e-3, **_: Any,
    ) -> Any:  # fmt: skip
        (beta1, beta2), t = map(np.longdouble, betas), self._step
        decay = np.longdouble("0.96")
        mu, mu_next = (beta1 * (1 - decay ** (i * momentum_decay) / 2) for i in (t, t + 1))
        self._product *= np.float32(mu)  # as torch keeps it
        product = np.longdouble(self._product)
        self._a = beta1 * self._a + (1 - beta1) * g
        self._b = beta2 * self._b + (1 - beta2) * g * g
        look = (1 - mu) * g / (1 - product) + mu_next * self._a / (1 - product * mu_next)
        return lr * look / (np.sqrt(self._b / (1 - beta2**t)) + eps)

    def _asgd(self, g: Array, lr: float, lambd: float = 1e-4, alpha: float = 0.75, **_: Any) -> Any:
        eta = np.float32(lr / (1 + lambd * lr * (self._step - 1)) ** alpha)  # as torch keeps it
        return np.longdouble(eta) * (g + np.longdouble(lambd) * self.param)

    def _radam(
        self, g: Array, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        **_: Any,
    ) -> Any:  # fmt: skip
        (beta1, beta2), t = map(np.longdouble, betas), self._step
        self._a = beta1 * self._a + (1 - beta1) * g
        self._b = beta2 * self._b + (1 - beta2) * g * g
        corrected, longest = self._a / (1 - beta1**t), 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if length <= 5:
            return lr * corrected
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return lr * corrected * np.sqrt(ratio * (1 - beta2**t)) / (np.sqrt(self._b) + eps)

    def _adadelta(self, g: Array, lr: float, rho: float = 0.9, eps: float = 1e-6, **_: Any) -> Any:
        kept = np.longdouble(rho)
        self._a = kept * self._a + (1 - kept) * g * g
        delta = np.sqrt(self._b + eps) / np.sqrt(self._a + eps) * g
        self._b = kept * self._b + (1 - kept) * delta**2
        return lr * delta

    def _rprop(
        self, g: Array, etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50), **_: Any,
    ) -> Any:  # fmt: skip
        turned = g * self._a
        factor = np.where(turned > 0, etas[1], np.where(turned < 0, etas[0], 1))
        self._b = np.clip(self._b * factor, *step_sizes)
        self._a = np.where(turned < 0, 0, g)
        return np.sign(self._a) * self._b

    def _lion(self, g: Array, lr: float, betas: tuple[float, float] = (0.9, 0.99), **_: Any) -> Any:
        beta1, beta2 = map(np.longdouble, betas)
        update = np.sign(beta1 * self._a + (1 - beta1) * g)
        self._a = beta2 * self._a + (1 - beta2) * g
        return lr * update
