"""Sees from metric lines that a run learns nothing, and says so once."""

from collections.abc import Iterator
from typing import Any

STEPS = 50  # that the loss must have stood there
MARGIN = 1e-3  # of what guessing costs
LEAST_SPREAD = 1e-3  # of features about their mean, as a share of their length


class Watch:
    """The two ways to collapse: a loss that stays where guessing puts it, features all alike."""

    def __init__(self, guessing: float | None, warmed_up: float) -> None:
        """`guessing`: the loss of who cannot tell anything apart; `warmed_up`: a step."""
        self.guessing, self.warmed_up = guessing, warmed_up
        self._since: int | None = None  # the first step of those at chance
        self._said: set[str] = set()

    def see(self, line: dict[str, Any]) -> Iterator[str]:
        """A metric line; what there is to say of it."""
        step, loss = line["step"], line["loss"]
        if self.guessing is not None and loss is not None and step > self.warmed_up:
            if abs(loss - self.guessing) > MARGIN * self.guessing:
                self._since = None
            elif self._since is None:
                self._since = step
            elif step - self._since >= STEPS:
                yield from self._once(
                    "loss",
                    f"step {step}: the loss has been {loss:.3f} for {step - self._since} steps, "
                    "what guessing comes to: nothing is learnt. Try a higher --set optim.lr, or "
                    "larger crops and less mixing.",
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
