"""Sees from metric lines that a run learns nothing, and says so once."""

from collections import deque
from collections.abc import Iterator
from typing import Any

STEPS = 50  # over which the mean of the loss counts
MARGIN = 1e-3  # of what guessing costs
LEAST_SPREAD = 1e-3  # of features about their mean, as a share of their length


class Watch:
    """The two ways to collapse: a loss no lower than guessing puts it, features all alike."""

    def __init__(self, guessing: float | None, warmed_up: float) -> None:
        """`guessing`: the loss of who cannot tell anything apart; `warmed_up`: a step."""
        self.guessing, self.warmed_up = guessing, warmed_up
        self._last: deque[tuple[int, float]] = deque()  # steps and losses
        self._said: set[str] = set()

    def see(self, line: dict[str, Any]) -> Iterator[str]:
        """A metric line; what there is to say of it."""
        step, loss = line["step"], line["loss"]
        if self.guessing is not None and loss is not None and step > self.warmed_up:
            self._last.append((step, loss))
            while len(self._last) > 1 and step - self._last[1][0] >= STEPS:
                self._last.popleft()
            mean = sum(each for _, each in self._last) / len(self._last)
            full = step - self._last[0][0] >= STEPS
            if full and mean > (1 - MARGIN) * self.guessing:
                yield from self._once(
                    "loss",
                    f"step {step}: for {STEPS} steps the loss has been {mean:.3f}, no lower than "
                    f"guessing's {self.guessing:.3f}: nothing is learnt. Try another "
                    "--set optim.lr, or larger crops and less mixing.",
                )
        spread = line.get("spread")
        if spread is not None and spread < LEAST_SPREAD:
            yield from self._once(
                "spread",
                f"step {step}: all images look alike to the backbone (their features differ by "
                f"{100 * spread:.2g} % of their length): it has collapsed. Try a lower "
                "--set optim.lr and a longer warm-up, or another --method.",
            )

    def _once(self, kind: str, sentence: str) -> Iterator[str]:
        if kind not in self._said:
            self._said.add(kind)
            yield f"warning: {sentence}"
