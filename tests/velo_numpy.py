"""VeLO once more, in float64 and plain loops, from the formulas alone: what ours is held against.

One tensor and one number at a time, nothing shared with `poisonbench.optimizers`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Tensor = np.ndarray
MOMENTUM = FACTORED = (0.9, 0.99, 0.999)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + np.exp(-x))


def rho(x: Tensor) -> Tensor:
    return np.maximum(x, 1e-9) ** -0.5


def log(x: Any) -> list[float]:
    return [0.5 * float(np.clip(np.log(1e-8 + abs(10 * y)), -5, 5)) for y in np.atleast_1d(x)]


class Reference:
    """State of a training, moved on by `step`."""

    def __init__(self, weights: dict[str, Any], params: list[Tensor], num_steps: int) -> None:
        def double(x: Any) -> Any:
            return (
                {k: double(v) for k, v in x.items()}
                if isinstance(x, dict)
                else np.asarray(x, np.float64)
            )

        self.weights, self.num_steps, self.t = double(weights), num_steps, 0
        self.params = [np.asarray(p, np.float64).reshape(p.shape or (1,)) for p in params]
        self.means, self.least = np.zeros(10), np.full(10, 1e12)
        start = self.weights["lstm_init_state"]
        self.h = [start["hidden"][0] for _ in params]
        self.c = [start["cell"][0] for _ in params]
        self.m = [np.zeros((3, *p.shape)) for p in self.params]
        self.v = [np.zeros(p.shape) for p in self.params]
        self.factored: list[list[tuple[Tensor, Tensor]] | None] = [None] * len(params)

    def step(self, gradients: list[Tensor], loss: float) -> list[Tensor]:
        """The parameters after one more step."""
        losses = self._losses(loss)
        seen = [self._tensor(i, losses) for i in range(len(self.params))]
        rnn = self.weights["rnn_params"]
        mixed = np.max(
            [np.maximum(x @ rnn["linear_1"]["w"] + rnn["linear_1"]["b"], 0) for x in seen], axis=0
        )
        for i, x in enumerate(seen):
            inner = x @ rnn["linear_2"]["w"] + rnn["linear_2"]["b"] + mixed
            gates = np.concatenate([inner, self.h[i]]) @ rnn["rnn/linear"]["w"] + rnn["rnn/linear"]["b"]
            a, g, f, o = np.split(gates, 4)
            self.c[i] = sigmoid(f + 1) * self.c[i] + sigmoid(a) * np.tanh(g)
            self.h[i] = sigmoid(o) * np.tanh(self.c[i])
            controls = self.h[i] @ rnn["rnn_to_controls"]["w"] + rnn["rnn_to_controls"]["b"]
            rate = (self.h[i] @ rnn["step_size"]["w"] + rnn["step_size"]["b"])[0]
            g = np.clip(np.asarray(gradients[i], np.float64).reshape(self.params[i].shape), -1000, 1000)
            self._move(i, g, controls, rate)
        self.t += 1
        return self.params

    def _losses(self, loss: float) -> list[float]:
        decays = [np.exp(-1 / 10 ** (1 + i / 9 * (np.log10(self.num_steps) - 1))) for i in range(10)]
        unbias = np.array([1 - b ** (self.t + 1) for b in decays])
        top = loss if self.t == 0 else max(self.means / unbias)
        loss = min(loss, 2 * abs(top))
        self.means = np.array([b * m + (1 - b) * loss for b, m in zip(decays, self.means, strict=True)])
        now = self.means / unbias
        self.least = np.minimum(self.least, now)
        if self.t < 2:
            return [0.0] * 9
        return [
            float(np.clip((now[i] - self.least[i]) / max(1e-8, now[i + 1] - self.least[i]) - 1, -1, 1))
            for i in range(9)
        ]

    def _tensor(self, i: int, losses: list[float]) -> Tensor:
        p = self.params[i]
        s = max(1e-9, float(np.mean(p**2))) ** -0.5
        m, v = s * self.m[i], s * self.v[i]
        time = [
            np.tanh(10 * (self.t / self.num_steps - c))
            for c in (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1, 1.1)
        ]
        rank = [float(sum(n > 1 for n in p.shape) == j) for j in range(5)]
        spread = [log(np.mean((v - one.mean()) ** 2))[0] for one in m]
        return np.array(
            [*time, *losses, *log(v.mean()), *rank, *[log(one.var())[0] for one in m], *spread]
        )

    def _move(self, i: int, g: Tensor, controls: Tensor, rate: float) -> None:
        p = self.params[i]
        self.m[i] = np.array([b * m + (1 - b) * g for b, m in zip(MOMENTUM, self.m[i], strict=True)])
        self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
        m, v, q = self.m[i], self.v[i], g**2 + 1e-30
        if p.ndim > 1:
            d1, d0 = np.argsort(p.shape, kind="stable")[-2:]
            new = (q.mean(d0, keepdims=True), q.mean(d1, keepdims=True))
        else:
            d1 = None
            new = (q, q)
        old = self.factored[i] or [(np.zeros_like(new[0]), np.zeros_like(new[1]))] * 3
        self.factored[i] = [
            (b * r + (1 - b) * new[0], b * c + (1 - b) * new[1])
            for b, (r, c) in zip(FACTORED, old, strict=True)
        ]
        rows = [np.broadcast_to(r, p.shape) for r, _ in self.factored[i]]
        columns = [np.broadcast_to(c, p.shape) for _, c in self.factored[i]]
        if p.ndim > 1:
            scale = [rho(r / (r.mean(d1, keepdims=True) + 1e-9)) * rho(c) for r, c in self.factored[i]]
            adafactor, last = [g * x for x in scale], [m[j] * scale[j] for j in range(3)]
        else:
            adafactor, last = (
                [g * rho(r + 1e-9) for r in rows],
                [m[j] * rows[j] ** -0.5 for j in range(3)],
            )
        root = (v + 1e-6) ** -0.5
        channels = [g, np.clip(g, -0.1, 0.1), p, *m, v, *(m * root), root, *adafactor, g * root]
        channels += [*rows, *columns, *[(r + 1e-8) ** -0.5 for r in rows]]
        channels += [*[(c + 1e-8) ** -0.5 for c in columns], *last]
        x = np.stack([c / np.sqrt(1e-5 + np.mean(c**2)) for c in channels], -1)
        bank = self.weights["ff_mod_stack"]["~"]

        def mix(name: str) -> Tensor:
            return 100 / len(controls) * sum(c * w for c, w in zip(controls, bank[name], strict=True))

        first = np.concatenate([mix(f"w0__{j}") for j in range(14)])
        x = np.maximum(x @ first + mix("b0"), 0)
        x = np.maximum(x @ mix("w1") + mix("b1"), 0)
        d, u, _ = np.moveaxis(x @ mix("w2") + mix("b2"), -1, 0)
        self.params[i] = p - 1e-3 * rate * np.sqrt(np.mean(p**2) + 1e-9) * d * np.exp(1e-3 * u)
